"""redis-py's pools, sync and async.

``BlockingConnectionPool`` waits. ``ConnectionPool`` refuses at once when ``max_connections`` are out: it has no wait,
and a refusal counts as a time-out, which it is to the app. A connection of it is out for as long as its command takes,
which the cache's operations tell, so only its gauges and refusals are kept: every command would pay for the rest.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Final

from fastapi_headroom import ledger
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pools.meter import Meter, Meters, Wait, waiting
from fastapi_headroom.probes.pools.series import Reading
from fastapi_headroom.probes.redis_hooks import address_of

_NO_LIMIT: Final = 2**31
"""What redis-py takes for max_connections where none is given (some of its pools take 100)."""


class RedisPools:
    """Listens to the pools of ``redis`` and ``redis.asyncio``."""

    modules: ClassVar[tuple[str, ...]] = ("redis.connection", "redis.asyncio.connection")
    stage: ClassVar[int | None] = ledger.CACHE
    finds_broken: ClassVar[bool] = False

    def attach(self, meters: Meters, patches: Patches) -> None:
        """Wrap checkout and checkin of both kinds, and connecting, which is what follows a wait."""
        from redis import connection as sync
        from redis.asyncio import connection as asynchronous
        from redis.exceptions import ConnectionError as RedisConnectionError

        kinds: tuple[tuple[Any, Any], ...] = (
            (sync.BlockingConnectionPool, _wrap_get),
            (asynchronous.BlockingConnectionPool, _wrap_async_get),
        )
        for pool, checkout in kinds:
            patches.wrap(pool, "get_connection", partial(checkout, meters, RedisConnectionError))
            patches.wrap(pool, "release", partial(_wrap_release, meters))
        # Where these refuse, nothing is connected: a ConnectionError there is a refusal.
        for pool, name in (
            (sync.ConnectionPool, "get_connection"),
            (sync.ConnectionPool, "make_connection"),
            (asynchronous.ConnectionPool, "get_available_connection"),
        ):
            refusal = None if name == "get_connection" else RedisConnectionError
            patches.wrap(pool, name, partial(_wrap_refusing, meters, refusal))
        patches.wrap(sync.AbstractConnection, "connect", _wrap_connect)
        patches.wrap(asynchronous.AbstractConnection, "connect", _wrap_async_connect)

    def pool_of(self, thing: Any) -> Any:
        """Return the pool itself, or a client's."""
        from redis import ConnectionPool
        from redis.asyncio import ConnectionPool as AsyncConnectionPool

        pool = getattr(thing, "connection_pool", thing)
        return pool if isinstance(pool, (ConnectionPool, AsyncConnectionPool)) else None

    def anchor(self, pool: Any) -> Any:
        """Return the pool itself."""
        return pool

    def name(self, pool: Any) -> str:
        """Return ``redis:host:port/db``."""
        return f"redis:{address_of(pool)}"

    def waits(self, pool: Any) -> bool:
        """Return whether it is a blocking one."""
        return "Blocking" in type(pool).__name__ or hasattr(pool, "timeout")

    def read(self, pool: Any, held: int) -> Reading:
        """Count the connections; one that was disconnected is not open, though the pool keeps its object."""
        maximum = pool.max_connections if pool.max_connections < _NO_LIMIT else None
        queue = getattr(pool, "pool", None)
        if queue is None:
            idle = sum(_is_open(connection) for connection in list(pool._available_connections))
            return Reading(len(pool._in_use_connections), idle, maximum)
        ready = {id(connection) for connection in list(queue.queue) if connection is not None}
        made = list(pool._connections)
        idle = sum(_is_open(connection) for connection in made if id(connection) in ready)
        return Reading(len(made) - len(ready), idle, maximum)


def _is_open(connection: Any) -> bool:
    return bool(connection.is_connected)


def _limited(meter: Meter) -> bool:
    """Return whether a checkout may wait."""
    return meter.series.pending is not None


def _end(meter: Meter, wait: Wait, refused: BaseException | None, refusal: type[Exception]) -> None:
    """End a wait that may have ended long ago; only what was refused while it lasted is a time-out."""
    waiting.set(None)
    if wait.waits and isinstance(refused, refusal):
        meter.refused()
    if _limited(meter):
        meter.end(wait)


def _begin(meter: Meter) -> Wait:
    wait = meter.begin() if _limited(meter) else Wait(meter, None)
    waiting.set(wait)
    return wait


def _begin_async(meter: Meter, pool: Any) -> Wait:
    """Begin a wait, or none where a connection is there and nobody stands in line: on one loop it stays there."""
    try:
        if not meter.waiting and _limited(meter) and not pool._condition.locked() and pool.can_get_connection():
            meter.at_once()
            wait = Wait(meter, None)
            wait.waits = False
            waiting.set(wait)
            return wait
    except AttributeError:  # a version that looks otherwise inside
        pass
    return _begin(meter)


def _wrap_get(meters: Meters, refusal: type[Exception], original: Any) -> Any:
    def get_connection(pool: Any, *args: Any, **options: Any) -> Any:
        meter = meters.of(pool)
        if meter is None:
            return original(pool, *args, **options)
        wait, refused = _begin(meter), None
        try:
            connection = original(pool, *args, **options)
        except BaseException as error:
            refused = error
            raise
        finally:
            _end(meter, wait, refused, refusal)
        meter.took(connection)
        return connection

    return get_connection


def _wrap_async_get(meters: Meters, refusal: type[Exception], original: Any) -> Any:
    async def get_connection(pool: Any, *args: Any, **options: Any) -> Any:
        meter = meters.of(pool)
        if meter is None:
            return await original(pool, *args, **options)
        wait, refused = _begin_async(meter, pool), None
        try:
            connection = await original(pool, *args, **options)
        except BaseException as error:
            refused = error
            raise
        finally:
            _end(meter, wait, refused, refusal)
        meter.took(connection)
        return connection

    return get_connection


def _wrap_refusing(meters: Meters, refusal: type[Exception] | None, original: Any) -> Any:
    """See which pools there are, and count what they refuse."""

    def take(pool: Any, *args: Any, **options: Any) -> Any:
        meter = meters.of(pool)
        if refusal is None:
            return original(pool, *args, **options)
        try:
            return original(pool, *args, **options)
        except refusal:
            if meter is not None and not _limited(meter):
                meter.refused()
            raise

    return take


def _wrap_release(meters: Meters, original: Any) -> Any:
    def release(pool: Any, connection: Any) -> Any:
        meter = meters.of(pool)
        if meter is not None:
            meter.gave(connection)
        return original(pool, connection)

    return release


def _found() -> Meter | None:
    """End the wait of the checkout that connects now: it has its connection. None outside a checkout."""
    wait = waiting.get()
    if wait is None:
        return None
    if _limited(wait.meter):
        wait.meter.end(wait)
    wait.waits = False
    return wait.meter


def _wrap_connect(original: Any) -> Any:
    def connect(connection: Any) -> Any:
        meter = _found()
        if meter is None or _is_open(connection):
            return original(connection)
        started = perf_counter()
        result = original(connection)
        meter.made(started)
        return result

    return connect


def _wrap_async_connect(original: Any) -> Any:
    async def timed(meter: Meter, connection: Any) -> Any:
        started = perf_counter()
        result = await original(connection)
        meter.made(started)
        return result

    def connect(connection: Any) -> Any:
        meter = _found()
        if meter is None or _is_open(connection):
            return original(connection)
        return timed(meter, connection)

    return connect
