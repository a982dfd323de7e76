"""The libraries that the kit of tests is run with: how each opens a pool, checks out, holds and closes."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import asyncpg
import httpcore
import httpx
import psycopg_pool
import redis
import redis.asyncio

from demo_app.stack.servers import Postgres, Redis


class Library(ABC):
    """One kind of pool. ``hold`` returns the seconds that the checkout took by the test's own clock."""

    module: ClassVar[str]
    """A module whose absence means that the app does not use the library."""
    label: ClassVar[str]
    cancels: ClassVar[bool] = True
    gave_up: ClassVar[type[Exception]]
    loses: ClassVar[bool] = False
    """Whether the library itself loses places of the pool when a waiter is cancelled or times out."""
    overhead: ClassVar[float] = 0.01
    """Seconds that the test's clock may run beyond the wait: a thread is woken, a request sent."""

    def __init__(self, postgres: Postgres, redis_server: Redis, service: str) -> None:
        self.postgres, self.redis, self.service = postgres, redis_server, service

    @property
    def name(self) -> str:
        """The name that a pool gets by itself."""
        return f"{self.label}:postgres@127.0.0.1:{self.postgres.port}"

    @property
    def dsn(self) -> str:
        """An address with a password, which must not show."""
        return f"postgresql://headroom:hunter2@127.0.0.1:{self.postgres.port}/postgres"

    @abstractmethod
    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        """Return an open pool."""

    @abstractmethod
    async def hold(self, pool: Any, seconds: float, *, fail: bool = False) -> float:
        """Check out, hold, give back; raise in between if asked to."""

    @abstractmethod
    async def close(self, pool: Any) -> None:
        """Close the pool."""

    def truth(self, pool: Any) -> int | None:
        """Return how many connections the pool has open by its own account, if it says."""
        return None


class Threaded(Library):
    """A library without async: each user has a thread."""

    cancels = False
    threads = ThreadPoolExecutor(16)

    async def hold(self, pool: Any, seconds: float, *, fail: bool = False) -> float:
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, context.run, self.work, pool, seconds, fail)

    @abstractmethod
    def work(self, pool: Any, seconds: float, fail: bool) -> float:
        """``hold`` in a thread."""


class Asyncpg(Library):
    module, label, gave_up = "asyncpg.pool", "asyncpg", TimeoutError
    patient: ClassVar[bool] = False

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        self.timeout = timeout
        return await asyncpg.create_pool(self.dsn, min_size=0, max_size=size)

    async def hold(self, pool: Any, seconds: float, *, fail: bool = False) -> float:
        timeout = None if self.patient and self.timeout > 1 else self.timeout
        asked = time.perf_counter()
        async with pool.acquire(timeout=timeout):
            waited = time.perf_counter() - asked
            await asyncio.sleep(seconds)
            if fail:
                raise ZeroDivisionError
        return waited

    async def close(self, pool: Any) -> None:
        await pool.close()

    def truth(self, pool: Any) -> int:
        return int(pool.get_size())


class AsyncpgPatient(Asyncpg):
    """asyncpg without a time-out: another way through its code."""

    patient = True


class PsycopgAsync(Library):
    module, label, gave_up = "psycopg_pool.pool_async", "psycopg", psycopg_pool.PoolTimeout

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        pool = psycopg_pool.AsyncConnectionPool(self.dsn, min_size=size, max_size=size, timeout=timeout, open=False)
        await pool.open()
        await pool.wait()
        return pool

    async def hold(self, pool: Any, seconds: float, *, fail: bool = False) -> float:
        asked = time.perf_counter()
        async with pool.connection():
            waited = time.perf_counter() - asked
            await asyncio.sleep(seconds)
            if fail:
                raise ZeroDivisionError
        return waited

    async def close(self, pool: Any) -> None:
        await pool.close()

    def truth(self, pool: Any) -> int:
        return int(pool.get_stats()["pool_size"])


class Psycopg(Threaded):
    module, label, gave_up = "psycopg_pool.pool", "psycopg", psycopg_pool.PoolTimeout

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        pool = psycopg_pool.ConnectionPool(self.dsn, min_size=size, max_size=size, timeout=timeout, open=False)
        pool.open(wait=True)
        return pool

    def work(self, pool: Any, seconds: float, fail: bool) -> float:
        asked = time.perf_counter()
        with pool.connection():
            waited = time.perf_counter() - asked
            time.sleep(seconds)
            if fail:
                raise ZeroDivisionError
        return waited

    async def close(self, pool: Any) -> None:
        pool.close()

    def truth(self, pool: Any) -> int:
        return int(pool.get_stats()["pool_size"])


class RedisAsync(Library):
    module, label, gave_up = "redis.asyncio.connection", "redis", redis.ConnectionError

    @property
    def name(self) -> str:
        return f"redis:127.0.0.1:{self.redis.port}/0"

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        return redis.asyncio.BlockingConnectionPool.from_url(self.redis.url, max_connections=size, timeout=timeout)

    async def hold(self, pool: Any, seconds: float, *, fail: bool = False) -> float:
        asked = time.perf_counter()
        connection = await pool.get_connection()
        waited = time.perf_counter() - asked
        try:
            await asyncio.sleep(seconds)
            if fail:
                raise ZeroDivisionError
        finally:
            await asyncio.shield(pool.release(connection))
        return waited

    async def close(self, pool: Any) -> None:
        await pool.aclose()

    def truth(self, pool: Any) -> int:
        return len(pool._in_use_connections) + sum(c.is_connected for c in pool._available_connections)


class RedisSync(Threaded):
    module, label, gave_up = "redis.connection", "redis", redis.ConnectionError

    @property
    def name(self) -> str:
        return f"redis:127.0.0.1:{self.redis.port}/0"

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        return redis.BlockingConnectionPool.from_url(self.redis.url, max_connections=size, timeout=timeout)

    def work(self, pool: Any, seconds: float, fail: bool) -> float:
        asked = time.perf_counter()
        connection = pool.get_connection()
        waited = time.perf_counter() - asked
        try:
            time.sleep(seconds)
            if fail:
                raise ZeroDivisionError
        finally:
            pool.release(connection)
        return waited

    async def close(self, pool: Any) -> None:
        pool.close()


class HttpxAsync(Library):
    module, label, gave_up = "httpcore._async.connection_pool", "httpx", httpx.PoolTimeout
    loses, overhead = True, 0.04

    @property
    def name(self) -> str:
        return "httpx"

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        return httpx.AsyncClient(
            base_url=self.service, limits=httpx.Limits(max_connections=size), timeout=httpx.Timeout(5, pool=timeout)
        )

    async def hold(self, pool: Any, seconds: float, *, fail: bool = False) -> float:
        asked = time.perf_counter()
        async with pool.stream("GET", "/") as response:
            waited = time.perf_counter() - asked
            await asyncio.sleep(seconds)
            if fail:
                raise ZeroDivisionError
            await response.aread()
        return waited

    async def close(self, pool: Any) -> None:
        await pool.aclose()

    def truth(self, pool: Any) -> int:
        return _kept(pool)


class HttpxSync(Threaded):
    module, label, gave_up = "httpcore._sync.connection_pool", "httpx", httpx.PoolTimeout
    loses, overhead = True, 0.04

    @property
    def name(self) -> str:
        return "httpx"

    async def open(self, size: int = 2, timeout: float = 5.0) -> Any:
        return httpx.Client(
            base_url=self.service, limits=httpx.Limits(max_connections=size), timeout=httpx.Timeout(5, pool=timeout)
        )

    def work(self, pool: Any, seconds: float, fail: bool) -> float:
        asked = time.perf_counter()
        with pool.stream("GET", "/") as response:
            waited = time.perf_counter() - asked
            time.sleep(seconds)
            if fail:
                raise ZeroDivisionError
            response.read()
        return waited

    async def close(self, pool: Any) -> None:
        pool.close()

    def truth(self, pool: Any) -> int:
        return _kept(pool)


def _kept(client: Any) -> int:
    """Return the connections that a pool of httpcore keeps a place for."""
    pool = client._transport._pool
    assert isinstance(pool, (httpcore.ConnectionPool, httpcore.AsyncConnectionPool))
    return sum(not connection.is_closed() for connection in pool.connections)


ALL: tuple[type[Library], ...] = (
    Asyncpg, AsyncpgPatient, PsycopgAsync, Psycopg, RedisAsync, RedisSync, HttpxAsync, HttpxSync,
)  # fmt: skip


class _Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def handle(self) -> None:
        with suppress(ConnectionResetError, BrokenPipeError):  # of a client that was cancelled
            super().handle()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """Serve a page that keeps connections open; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Service) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
