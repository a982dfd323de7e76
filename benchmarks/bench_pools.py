"""What the probe adds to a checkout and checkin of other libraries' pools, in microseconds of CPU.

With connections that lie ready, of a real PostgreSQL and Redis, within a request; httpx' pool answers from memory,
so there it is a whole request. The column "peer" is the call without the probe.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpcore
import psycopg_pool
import redis
import redis.asyncio

from benchmarks.measuring import Row, Work, added, main
from demo_app.stack.servers import Postgres, Redis
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pools.probe import OtherPoolsProbe
from fastapi_headroom.store.writer import Writer

BUDGET = 5.0
"""Microseconds."""
BATCH = 20
"""Checkouts of async pools in one run of the loop, whose own cost is then small."""


class _Stream(httpcore.AsyncMockStream):
    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class _Answering(httpcore.AsyncMockBackend):
    """A network that answers every request alike."""

    async def connect_tcp(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        return _Stream([])


async def _no_reset(connection: Any) -> None:
    """Leave out the statement that asyncpg resets a connection with: it would hide what is measured."""


async def _open(postgres: Postgres, redis_server: Redis) -> dict[str, Callable[[], Awaitable[None]]]:
    pg = await asyncpg.create_pool(postgres.dsn, min_size=1, max_size=2, reset=_no_reset)
    psy = psycopg_pool.AsyncConnectionPool(postgres.dsn, min_size=1, max_size=2, open=False)
    await psy.open(wait=True)
    red = redis.asyncio.BlockingConnectionPool.from_url(redis_server.url, max_connections=2)
    refusing = redis.asyncio.ConnectionPool.from_url(redis_server.url, max_connections=2)
    http = httpcore.AsyncConnectionPool(network_backend=_Answering([]))

    async def of_asyncpg() -> None:
        await pg.release(await pg.acquire())

    async def of_psycopg() -> None:
        await psy.putconn(await psy.getconn())

    async def of_redis() -> None:
        await red.release(await red.get_connection())

    async def of_refusing() -> None:
        await refusing.release(await refusing.get_connection())

    async def of_httpx() -> None:
        await http.request("GET", "http://shop.example/")

    return {
        "asyncpg": of_asyncpg,
        "psycopg_pool, async": of_psycopg,
        "redis-py BlockingConnectionPool, async": of_redis,
        "redis-py ConnectionPool, async": of_refusing,
        "httpx": of_httpx,
    }


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield one row per library."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Postgres(Path(folder) / "postgres") as postgres,
        Redis(Path(folder) / "redis") as redis_server,
    ):
        yield from _rows(quick, postgres, redis_server)


def _rows(quick: bool, postgres: Postgres, redis_server: Redis) -> Iterator[Row]:
    loop = asyncio.new_event_loop()
    request = Ledger("GET")
    request.route = "/orders/{order_id}"
    request.stepping = True  # as while a step of a request runs
    ledger.current.set(request)
    sync = psycopg_pool.ConnectionPool(postgres.dsn, min_size=1, max_size=2, open=True)
    sync.wait()
    red = redis.BlockingConnectionPool.from_url(redis_server.url, max_connections=2)
    work: dict[str, tuple[Work, int]] = {
        "psycopg_pool": (lambda: sync.putconn(sync.getconn()), 1),
        "redis-py BlockingConnectionPool": (lambda: red.release(red.get_connection()), 1),
    }
    for name, checkout in loop.run_until_complete(_open(postgres, redis_server)).items():
        work[name] = (lambda checkout=checkout: loop.run_until_complete(_batch(checkout)), BATCH)
    writer, probe = Writer.in_memory(), OtherPoolsProbe()
    for name, (call, calls) in work.items():
        call()
        alone, more = added(call, lambda: probe.bind(writer), probe.close, 5 if quick else 21, 1_000 // calls)
        yield Row(f"{name}: added, and alone", "us", more / calls, alone / calls, budget=BUDGET)
    sync.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0.1))


async def _batch(checkout: Callable[[], Awaitable[None]]) -> None:
    for _ in range(BATCH):
        await checkout()


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
