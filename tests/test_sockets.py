"""The socket that a suspended coroutine waits for is found, whichever library waits; the kernel is asked about it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import httpx
import psycopg
import pytest
import uvloop
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from demo_app.stack.servers import Postgres
from demo_app.stack.servers import Redis as RedisServer
from fastapi_headroom.sockets import awaited_by, seconds_since_data

pytestmark = pytest.mark.alone

Step = Callable[[], Coroutine[Any, Any, Any]]
SLOW = "select pg_sleep(0.06)"  # well under the 100 ms after which psycopg wakes up by itself


class Looking(Coroutine[Any, Any, Any]):
    """Drives a coroutine and looks, before each step, for what it waited for."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self._last = time.perf_counter()
        self.found: Any = None
        """What was waited for in the longest wait."""
        self.since_data: float | None = None
        self.longest = 0.0

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # type: ignore[return-value]

    def __iter__(self) -> Looking:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        waited = time.perf_counter() - self._last
        if waited > self.longest:
            self.longest = waited
            self.found = awaited_by(self._coroutine)
            self.since_data = seconds_since_data(self.found)
        try:
            return self._coroutine.send(value)
        finally:
            self._last = time.perf_counter()

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()


async def look(step: Step) -> Looking:
    """Run a step that waits for some 60 ms, in the depth of a few others."""

    async def within() -> None:
        await step()

    looking = Looking(within())
    await looking
    return looking


def check(looking: Looking) -> None:
    """The wait was for a TCP socket whose data came when it ended."""
    assert looking.longest >= 0.05
    assert looking.since_data is not None, f"no socket was found: {looking.found!r}"
    assert looking.since_data < looking.longest - 0.005, "data of another time"


@asynccontextmanager
async def slow_http() -> AsyncIterator[str]:
    """Serve HTTP that answers after 60 ms."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.06)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def of_sqlalchemy(postgres: Postgres, _: RedisServer) -> None:
    """SQLAlchemy waits within a greenlet."""
    engine = create_async_engine(postgres.url())
    async with engine.connect() as connection:
        check(await look(lambda: connection.execute(text(SLOW))))
    await engine.dispose()


async def of_psycopg_engine(postgres: Postgres, _: RedisServer) -> None:
    """SQLAlchemy with psycopg."""
    engine = create_async_engine(postgres.url("psycopg"))
    async with engine.connect() as connection:
        check(await look(lambda: connection.execute(text(SLOW))))
    await engine.dispose()


async def of_a_generator(postgres: Postgres, _: RedisServer) -> None:
    """A query in an asynchronous generator, as in a dependency with yield."""
    engine = create_async_engine(postgres.url())

    async def rows() -> AsyncIterator[Any]:
        async with engine.connect() as connection:
            yield await connection.execute(text(SLOW))

    async def step() -> None:
        async for _ in rows():
            pass

    async with engine.connect() as connection:  # so that the longest wait is the query
        await connection.execute(text("select 1"))
    check(await look(step))
    await engine.dispose()


async def of_asyncpg(postgres: Postgres, _: RedisServer) -> None:
    """asyncpg, bare, prepared, and from its own pool."""
    connection = await asyncpg.connect(postgres.dsn)
    check(await look(lambda: connection.fetch(SLOW)))
    check(await look(lambda: connection.execute(SLOW)))
    prepared = await connection.prepare(SLOW)
    check(await look(prepared.fetch))
    await connection.close()
    async with asyncpg.create_pool(postgres.dsn, min_size=1) as pool:
        check(await look(lambda: pool.fetch(SLOW)))


async def of_psycopg(postgres: Postgres, _: RedisServer) -> None:
    """psycopg, bare."""
    connection = await psycopg.AsyncConnection.connect(postgres.dsn)
    check(await look(lambda: connection.execute(SLOW)))
    await connection.close()


async def of_redis(_: Postgres, redis_server: RedisServer) -> None:
    """redis-py, a command and a pipeline."""
    async with Redis.from_url(redis_server.url) as client:
        await client.delete("nothing")
        check(await look(lambda: client.blpop(["nothing"], timeout=0.06)))


async def of_httpx(_: Postgres, __: RedisServer) -> None:
    """httpx."""
    async with slow_http() as url, httpx.AsyncClient() as client:
        check(await look(lambda: client.get(url)))


async def of_aiohttp(_: Postgres, __: RedisServer) -> None:
    """aiohttp."""
    async with slow_http() as url, aiohttp.ClientSession() as session:

        async def step() -> None:
            async with session.get(url) as response:
                await response.read()

        check(await look(step))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    "wait",
    [
        of_sqlalchemy,
        of_psycopg_engine,
        of_a_generator,
        of_asyncpg,
        of_psycopg,
        of_redis,
        of_httpx,
        of_aiohttp,
    ],
)
def test_the_socket_of_a_wait_is_found(
    wait: Callable[[Postgres, RedisServer], Awaitable[None]], run: Any, postgres: Postgres, redis_server: RedisServer
) -> None:
    """For each library the socket is found, and the kernel says that data came when the wait ended."""
    run(wait(postgres, redis_server))


async def test_a_wait_without_a_socket_has_none() -> None:
    """Sleeps, futures and locks wait for no socket; nor does a coroutine that has not begun."""
    for step in (lambda: asyncio.sleep(0.02), lambda: asyncio.wait_for(asyncio.sleep(0.02), 1)):
        assert (await look(step)).found is None
    fresh = asyncio.sleep(1)
    assert awaited_by(fresh) is None
    fresh.close()


def test_the_age_of_data_is_the_kernels() -> None:
    """Data that came 50 ms ago are 50 ms old, within a tick of the kernel, by socket and by descriptor."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with client, accepted:
            began = time.perf_counter()
            client.send(b"x")
            accepted.recv(1)
            while time.perf_counter() < began + 0.05:
                time.sleep(0.001)
            for connection in (accepted, accepted.fileno()):
                age = seconds_since_data(connection)
                assert age is not None
                assert age == pytest.approx(time.perf_counter() - began, abs=0.011)
            accepted.send(b"the descriptor is still open")


def test_other_sockets_tell_nothing(tmp_path: Path) -> None:
    """Unix sockets, closed ones and other objects have no age."""
    left, right = socket.socketpair()
    with left, right:
        left.send(b"x")
        right.recv(1)
        assert seconds_since_data(right) is None
        assert seconds_since_data(right.fileno()) is None
    assert seconds_since_data(right) is None
    assert seconds_since_data(object()) is None
    assert seconds_since_data(None) is None
