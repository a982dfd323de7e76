"""redis-py's pools, sync and async.

``BlockingConnectionPool`` waits. ``ConnectionPool`` refuses at once when ``max_connections`` are out: it has no wait,
and a refusal counts as a time-out, which it is to the app. A connection of it is out for as long as its command takes,
which the cache's operations tell, so only its gauges and refusals are kept: every command would pay for the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Final

from fastapi_headroom import ledger
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pools.meter import Meter, Meters
from fastapi_headroom.probes.pools.series import Reading
from fastapi_headroom.probes.pools.timing import Creation, waiting
from fastapi_headroom.probes.redis_hooks import address_of

_NO_LIMIT: Final = 2**31
"""What redis-py takes for max_connections where none is given (some of its pools take 100)."""


class RedisPools:
    """Listens to the pools of ``redis`` and ``redis.asyncio``."""

    modules: ClassVar[tuple[str, ...]] = ("redis.connection", "redis.asyncio.connection")
    stage: ClassVar[int | None] = ledger.CACHE
    finds_broken: ClassVar[bool] = False
    of_database: ClassVar[bool] = False

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
        patches.wrap(sync.AbstractConnection, "connect", partial(_wrap_connect, meters))
        patches.wrap(asynchronous.AbstractConnection, "connect", partial(_wrap_async_connect, meters))

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


def _ready(meter: Meter, pool: Any) -> Any:
    """Return the connection that a checkout of an async pool takes at once, None if it may wait, or has to connect.

    On one loop nobody else can take what lies ready before the checkout does, which awaits nothing until then.
    """
    try:
        lying = pool._available_connections
        if lying and meter.limited and not meter.waiting and not pool._in_maintenance and not pool._condition.locked():
            connection = lying[-1]
            return connection if connection.is_connected else None
    except (AttributeError, LookupError, TypeError):  # a version that looks otherwise inside
        pass
    return None


def _wrap_get(meters: Meters, refusal: type[Exception], original: Any) -> Any:
    def get_connection(pool: Any, *args: Any, **options: Any) -> Any:
        meter = meters.of(pool)
        if meter is None:
            return original(pool, *args, **options)
        with meter.begin(refusal):
            connection = original(pool, *args, **options)
        meter.took(connection)
        return connection

    return get_connection


def _wrap_async_get(meters: Meters, refusal: type[Exception], original: Any) -> Any:
    known = meters.known

    async def wait_for_one(meter: Meter, pool: Any, *args: Any, **options: Any) -> Any:
        with meter.begin(refusal):
            connection = await original(pool, *args, **options)
        meter.took(connection)
        return connection

    async def get_connection(pool: Any, *args: Any, **options: Any) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is None:
            return await original(pool, *args, **options)
        connection = _ready(meter, pool)
        if connection is None:
            return await wait_for_one(meter, pool, *args, **options)
        meter.at_once()
        meter.took(connection)  # if it turns out to be broken, and for good, it is released
        return await original(pool, *args, **options)

    return get_connection


def _wrap_refusing(meters: Meters, refusal: type[Exception] | None, original: Any) -> Any:
    """See which pools there are, and count what they refuse."""

    known = meters.known

    def take(pool: Any, *args: Any, **options: Any) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if refusal is None:
            return original(pool, *args, **options)
        try:
            return original(pool, *args, **options)
        except refusal:
            if meter is not None and not meter.limited:
                meter.refused()
            raise

    return take


def _wrap_release(meters: Meters, original: Any) -> Any:
    known = meters.known

    def release(pool: Any, connection: Any) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is not None:
            meter.gave(connection)
        return original(pool, connection)

    return release


def _opened_for(meters: Meters, connection: Any) -> Meter | None:
    """Return the meter of the pool that a connection is opened for, None if it is open, or of no pool that waits.

    The checkout that connects now has its connection: its wait ends.
    """
    wait = waiting.get()
    if wait is not None:
        wait.meter.end(wait)
    if _is_open(connection):
        return None
    return wait.meter if wait is not None else meters.holding(connection)


def _wrap_connect(meters: Meters, original: Any) -> Any:
    def connect(connection: Any) -> Any:
        meter = _opened_for(meters, connection)
        if meter is None:
            return original(connection)
        with Creation(meter, None):
            return original(connection)

    return connect


def _wrap_async_connect(meters: Meters, original: Any) -> Any:
    async def timed(meter: Meter, connection: Any) -> Any:
        with Creation(meter, None):
            return await original(connection)

    checkout = waiting.get

    def connect(connection: Any) -> Any:
        if checkout() is None and connection.is_connected:  # nearly always: each command of a client asks for this
            return original(connection)
        meter = _opened_for(meters, connection)
        return original(connection) if meter is None else timed(meter, connection)

    return connect
