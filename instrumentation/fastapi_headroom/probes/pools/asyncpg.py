"""asyncpg's own pools. A time-out of ``acquire`` is counted; one by ``asyncio.timeout`` around it is a wait only."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, ClassVar, Final

from fastapi_headroom import ledger
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pools.meter import Meters, address
from fastapi_headroom.probes.pools.series import Reading
from fastapi_headroom.probes.pools.timing import Creation, waiting
from fastapi_headroom.urls import split

_WAITS_IN_PLACE: Final = sys.version_info >= (3, 12)
"""Before Python 3.12 a checkout with a time-out runs in a task of its own: somebody else may be faster."""


class AsyncpgPools:
    """Listens to ``asyncpg.create_pool``'s pools."""

    modules: ClassVar[tuple[str, ...]] = ("asyncpg.pool",)
    stage: ClassVar[int | None] = None
    finds_broken: ClassVar[bool] = True
    of_database: ClassVar[bool] = True

    def attach(self, meters: Meters, patches: Patches) -> None:
        """Wrap checkout and checkin, and the holder that a checkout gets from the queue."""
        from asyncpg.pool import Pool, PoolConnectionHolder

        patches.wrap(Pool, "_acquire", lambda original: _wrap_acquire(meters, original))
        patches.wrap(Pool, "_get_new_connection", lambda original: _wrap_create(meters, original))
        patches.wrap(PoolConnectionHolder, "acquire", lambda original: _wrap_take(meters, original))
        patches.wrap(PoolConnectionHolder, "_release_on_close", lambda original: _wrap_end(meters, original))
        patches.wrap(PoolConnectionHolder, "_release", lambda original: _wrap_give(meters, original))

    def pool_of(self, thing: Any) -> Any:
        """Return the pool itself."""
        from asyncpg.pool import Pool

        return thing if isinstance(thing, Pool) else None

    def anchor(self, pool: Any) -> Any:
        """Return the first holder: pools have no room for weak references. There is none before the pool is open."""
        return pool._holders[0] if pool._holders else None

    def name(self, pool: Any) -> str:
        """Return ``asyncpg:database@host:port``."""
        arguments = pool._connect_kwargs
        dsn = pool._connect_args[0] if pool._connect_args else None
        parts = split(dsn or "")
        host, _, port = parts.netloc.rpartition("@")[2].partition(",")[0].partition(":")
        database = arguments.get("database") or parts.path.lstrip("/") or arguments.get("user") or parts.username
        return address("asyncpg", database, arguments.get("host") or host, arguments.get("port") or port)

    def waits(self, pool: Any) -> bool:
        """Return True: they all do."""
        return True

    def read(self, pool: Any, held: int) -> Reading | None:
        """Count the holders: what is out includes what was before measuring began."""
        if pool._closed:
            return None
        used = sum(holder._in_use is not None for holder in pool._holders)
        return Reading(used, pool.get_idle_size(), pool.get_max_size())


def _wrap_acquire(meters: Meters, original: Any) -> Any:
    """Time the wait for a holder; ``_wrap_take`` ends it."""

    async def wait_for_one(meter: Any, pool: Any, timeout: float | None) -> Any:
        with meter.begin(TimeoutError):
            return await original(pool, timeout)

    known = meters.known

    def _acquire(pool: Any, timeout: float | None) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is None or pool._closing or pool._closed:
            return original(pool, timeout)
        if (timeout is None or _WAITS_IN_PLACE) and not pool._queue.empty():
            meter.at_once()  # on one loop nobody else can take what lies ready
            return original(pool, timeout)
        return wait_for_one(meter, pool, timeout)

    return _acquire


def _wrap_take(meters: Meters, original: Any) -> Any:
    known = meters.known

    async def take(meter: Any, holder: Any) -> Any:
        wait = waiting.get()
        if wait is not None:
            wait.meter.end(wait)
        if holder._con is not None and holder._con.is_closed():
            meter.lost()
        proxy = await original(holder)
        meter.took(holder)
        return proxy

    def acquire(holder: Any) -> Any:
        pool = holder._pool
        meter = known(id(pool)) or meters.of(pool)
        if meter is None:
            return original(holder)
        connection = holder._con
        if (
            meter.waiting
            or connection is None
            or holder._setup is not None
            or holder._generation != pool._generation
            or connection.is_closed()
        ):
            return take(meter, holder)
        meter.took(holder)  # nothing is awaited on this way, and nothing can fail
        return original(holder)

    return acquire


def _wrap_give(meters: Meters, original: Any) -> Any:
    known = meters.known

    def _release(holder: Any) -> None:
        if holder._in_use is not None:
            pool = holder._pool
            meter = known(id(pool)) or meters.of(pool)
            if meter is not None:
                meter.gave(holder)
        original(holder)

    return _release


def _wrap_end(meters: Meters, original: Any) -> Any:
    """Tell connections that were lost from those that somebody closed: only the frames above know."""

    def _release_on_close(holder: Any) -> None:
        meter = meters.of(holder._pool)
        if meter is not None and not _closed_by_us(sys._getframe(1)):
            meter.lost()
        original(holder)

    return _release_on_close


def _closed_by_us(frame: FrameType | None) -> bool:
    """Return whether somebody closed the connection in good order: its owner, or the pool for its age.

    The event loop cleans up when the server hung up. A pool terminates what it finds broken, or cannot reset, as it
    comes back.
    """
    caller = frame.f_back if frame is not None else None
    if caller is None or caller.f_globals.get("__name__") != "asyncpg.connection":
        return False
    by = caller.f_back
    if caller.f_code.co_name == "terminate":
        return by is None or (by.f_code.co_name, by.f_globals.get("__name__")) != ("release", "asyncpg.pool")
    return caller.f_code.co_name == "close"


def _wrap_create(meters: Meters, original: Any) -> Any:
    async def _get_new_connection(pool: Any) -> Any:
        meter = meters.of(pool)
        if meter is None:
            return await original(pool)
        with Creation(meter, ledger.current.get()):
            return await original(pool)

    return _get_new_connection
