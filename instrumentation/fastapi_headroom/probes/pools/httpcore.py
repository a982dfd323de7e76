"""The pools of httpx, which are httpcore's, sync and async. A connection is out until the response is closed."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any, ClassVar

from fastapi_headroom import ledger
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pools.meter import Meter, Meters
from fastapi_headroom.probes.pools.series import Reading
from fastapi_headroom.probes.pools.timing import Creation


class HttpcorePools:
    """Listens to the pools below ``httpx.Client`` and ``httpx.AsyncClient``."""

    modules: ClassVar[tuple[str, ...]] = ("httpcore._sync.connection_pool", "httpcore._async.connection_pool")
    stage: ClassVar[int | None] = ledger.HTTP_CLIENT
    finds_broken: ClassVar[bool] = False

    def attach(self, meters: Meters, patches: Patches) -> None:
        """Wrap the request, the wait within it, connecting, and the close of the response."""
        from httpcore._async import connection as async_connection
        from httpcore._async import connection_pool as async_pool
        from httpcore._exceptions import PoolTimeout
        from httpcore._sync import connection, connection_pool

        wrap = patches.wrap
        wrap(connection_pool.ConnectionPool, "handle_request", lambda original: _wrap_handle(meters, original))
        wrap(connection_pool.PoolRequest, "wait_for_connection", lambda original: _wrap_wait(original, PoolTimeout))
        wrap(connection_pool.PoolByteStream, "close", lambda original: _wrap_close(meters, original))
        wrap(connection.HTTPConnection, "_connect", _wrap_connect)
        wrap(
            async_pool.AsyncConnectionPool,
            "handle_async_request",
            lambda original: _wrap_async_handle(meters, original),
        )
        wrap(
            async_pool.AsyncPoolRequest,
            "wait_for_connection",
            lambda original: _wrap_async_wait(original, PoolTimeout),
        )
        wrap(async_pool.PoolByteStream, "aclose", lambda original: _wrap_close(meters, original))
        wrap(async_connection.AsyncHTTPConnection, "_connect", _wrap_async_connect)

    def pool_of(self, thing: Any) -> Any:
        """Return the pool itself, or a client's for addresses without a proxy of their own."""
        import httpcore

        pool = getattr(getattr(thing, "_transport", None), "_pool", thing)
        return pool if isinstance(pool, (httpcore.ConnectionPool, httpcore.AsyncConnectionPool)) else None

    def anchor(self, pool: Any) -> Any:
        """Return the pool itself."""
        return pool

    def name(self, pool: Any) -> str:
        """Return ``httpx``: a pool has no address, it serves all hosts of its client."""
        return "httpx"

    def waits(self, pool: Any) -> bool:
        """Return True: they all do."""
        return True

    def read(self, pool: Any, held: int) -> Reading:
        """Count the connections."""
        idle = used = 0
        for connection in pool.connections:
            if connection.is_idle():
                idle += 1
            elif not connection.is_closed():
                used += 1
        maximum, kept = pool._max_connections, pool._max_keepalive_connections
        return Reading(used, idle, maximum if maximum < sys.maxsize else None, kept if kept < sys.maxsize else None)


class _Call:
    """A request under way: how long it waited, and what it has taken.

    When a connection comes back, httpcore wakes everyone in line for it: all but one wait once more. So the waits of
    a request are summed and recorded as one when it has its answer.
    """

    __slots__ = ("meter", "request", "taken", "waited")

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.request = ledger.current.get()
        self.taken: Any = None
        self.waited = -1.0
        """Seconds; below 0 while no connection was asked for."""

    def take(self, request: Any) -> None:
        """Note that the pool's request has a connection."""
        self.taken = request
        self.meter.took(request)

    def at_once(self, request: Any) -> None:
        """Note that the pool's request has got a connection without waiting."""
        if self.waited < 0.0:
            self.waited = 0.0
        self.taken = request
        self.meter.took(request)

    def add(self, waited: float) -> None:
        """Add to the wait."""
        self.waited = max(self.waited, 0.0) + waited

    def __enter__(self) -> None:
        _calling.set(self)

    def __exit__(self, kind: Any, *_: object) -> None:
        _calling.set(None)
        if kind is not None:
            self.meter.gave(self.taken)
        if self.waited == 0.0:
            self.meter.at_once()
        elif self.waited > 0.0:
            self.meter.record(self.request, self.waited)


_calling: ContextVar[_Call | None] = ContextVar("headroom_httpcore_call", default=None)


def _wrap_handle(meters: Meters, original: Any) -> Any:
    known = meters.known

    def handle_request(pool: Any, request: Any) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is None:
            return original(pool, request)
        with _Call(meter):
            return original(pool, request)

    return handle_request


def _wrap_async_handle(meters: Meters, original: Any) -> Any:
    known = meters.known

    async def handle_async_request(pool: Any, request: Any) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is None:
            return await original(pool, request)
        with _Call(meter):
            return await original(pool, request)

    return handle_async_request


def _wrap_wait(original: Any, timed_out: type[Exception]) -> Any:
    def wait_for_connection(request: Any, timeout: float | None = None) -> Any:
        call = _calling.get()
        if call is None:
            return original(request, timeout)
        meter = call.meter
        if request.connection is not None:
            call.at_once(request)
            return original(request, timeout)
        wait = meter.begin()
        try:
            connection = original(request, timeout)
        except timed_out:
            meter.refused()
            raise
        finally:
            call.add(meter.leave(wait))
        call.take(request)
        return connection

    return wait_for_connection


def _wrap_async_wait(original: Any, timed_out: type[Exception]) -> Any:
    async def wait_in_line(call: _Call, request: Any, timeout: float | None) -> Any:
        meter = call.meter
        wait = meter.begin()
        try:
            connection = await original(request, timeout)
        except timed_out:
            meter.refused()
            raise
        finally:
            call.add(meter.leave(wait))
        call.take(request)
        return connection

    def wait_for_connection(request: Any, timeout: float | None = None) -> Any:
        call = _calling.get()
        if call is None:
            return original(request, timeout)
        if request.connection is None:
            return wait_in_line(call, request, timeout)
        call.at_once(request)
        return original(request, timeout)

    return wait_for_connection


def _wrap_close(meters: Meters, original: Any) -> Any:
    known = meters.known

    def close(stream: Any) -> Any:
        if not stream._closed:
            meter = known(id(stream._pool)) or meters.of(stream._pool)
            if meter is not None:
                meter.gave(stream._pool_request)
        return original(stream)

    return close


def _wrap_connect(original: Any) -> Any:
    def _connect(connection: Any, request: Any) -> Any:
        call = _calling.get()
        if call is None:
            return original(connection, request)
        with Creation(call.meter, None):
            return original(connection, request)

    return _connect


def _wrap_async_connect(original: Any) -> Any:
    async def _connect(connection: Any, request: Any) -> Any:
        call = _calling.get()
        if call is None:
            return await original(connection, request)
        with Creation(call.meter, None):
            return await original(connection, request)

    return _connect
