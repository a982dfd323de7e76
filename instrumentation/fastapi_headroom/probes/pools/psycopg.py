"""psycopg_pool's pools, sync and async.

They open connections in workers of their own: a checkout that waits until one is open waits like for one that
comes back, so a wait holds the opening. A null pool opens in the checkout itself; there it is create time.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, ClassVar, Final

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pools.meter import Meters, address
from fastapi_headroom.probes.pools.series import Reading
from fastapi_headroom.probes.pools.timing import Creation, waiting

_GIVEN_BY_ITSELF: Final = re.compile(r"pool-\d+")


class PsycopgPools:
    """Listens to ``ConnectionPool``, ``AsyncConnectionPool`` and their null pools."""

    modules: ClassVar[tuple[str, ...]] = ("psycopg_pool.pool", "psycopg_pool.pool_async")
    stage: ClassVar[int | None] = None
    finds_broken: ClassVar[bool] = True

    def attach(self, meters: Meters, patches: Patches) -> None:
        """Wrap checkout, connecting and checkin of both."""
        from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

        kinds: tuple[tuple[Any, Any, Any], ...] = (
            (ConnectionPool, _wrap_getconn, _wrap_connect),
            (AsyncConnectionPool, _wrap_async_getconn, _wrap_async_connect),
        )
        for pool, checkout, connect in kinds:
            patches.wrap(pool, "_getconn_unchecked", partial(checkout, meters, PoolTimeout))
            patches.wrap(pool, "_connect", partial(connect, meters))
            patches.wrap(pool, "putconn", partial(_wrap_putconn, meters))
            patches.wrap(pool, "_putconn", partial(_wrap_reject, meters))

    def pool_of(self, thing: Any) -> Any:
        """Return the pool itself."""
        from psycopg_pool import AsyncConnectionPool, ConnectionPool

        return thing if isinstance(thing, (ConnectionPool, AsyncConnectionPool)) else None

    def anchor(self, pool: Any) -> Any:
        """Return the pool itself."""
        return pool

    def name(self, pool: Any) -> str:
        """Return ``psycopg:NAME``, where the pool was given none ``psycopg:database@host:port``."""
        from psycopg.conninfo import conninfo_to_dict

        if not _GIVEN_BY_ITSELF.fullmatch(pool.name) or callable(pool.conninfo) or callable(pool.kwargs):
            return f"psycopg:{pool.name}"
        known = {"dbname", "user", "host", "port"}
        arguments = {key: value for key, value in (pool.kwargs or {}).items() if key in known}
        found = conninfo_to_dict(pool.conninfo or "", **arguments)
        return address("psycopg", found.get("dbname") or found.get("user"), found.get("host"), found.get("port"))

    def waits(self, pool: Any) -> bool:
        """Return True: they all do."""
        return True

    def read(self, pool: Any, held: int) -> Reading | None:
        """Read the pool's own numbers. It does not know what is out, so what we saw going out is."""
        stats = pool.get_stats()
        broken = stats.get("connections_lost", 0) + stats.get("returns_bad", 0)
        if pool.closed:
            return Reading(held, 0, broken=broken) if held else None
        return Reading(held, len(pool._pool), pool.max_size or None, broken=broken)


def _wrap_getconn(meters: Meters, timed_out: type[Exception], original: Any) -> Any:
    known = meters.known

    def _getconn_unchecked(pool: Any, timeout: float) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is None:
            return original(pool, timeout)
        with meter.begin(timed_out):
            connection = original(pool, timeout)
        meter.took(connection)
        return connection

    return _getconn_unchecked


def _wrap_async_getconn(meters: Meters, timed_out: type[Exception], original: Any) -> Any:
    known = meters.known

    async def _getconn_unchecked(pool: Any, timeout: float) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is None:
            return await original(pool, timeout)
        with meter.begin(timed_out):
            connection = await original(pool, timeout)
        meter.took(connection)
        return connection

    return _getconn_unchecked


def _wrap_connect(meters: Meters, original: Any) -> Any:
    def _connect(pool: Any, timeout: float | None = None) -> Any:
        meter = meters.of(pool)
        if meter is None:
            return original(pool, timeout)
        with Creation(meter, _end_wait_for_creation()):
            return original(pool, timeout)

    return _connect


def _wrap_async_connect(meters: Meters, original: Any) -> Any:
    async def _connect(pool: Any, timeout: float | None = None) -> Any:
        meter = meters.of(pool)
        if meter is None:
            return await original(pool, timeout)
        with Creation(meter, _end_wait_for_creation()):
            return await original(pool, timeout)

    return _connect


def _end_wait_for_creation() -> Ledger | None:
    """End the wait of the checkout that opens a connection itself, and return its request. None in a worker."""
    wait = waiting.get()
    if wait is None:
        return None
    wait.meter.end(wait)
    return wait.request


def _wrap_putconn(meters: Meters, original: Any) -> Any:
    known = meters.known

    def putconn(pool: Any, connection: Any) -> Any:
        meter = known(id(pool)) or meters.of(pool)
        if meter is not None:
            meter.gave(connection)
        return original(pool, connection)

    return putconn


def _wrap_reject(meters: Meters, original: Any) -> Any:
    def _putconn(pool: Any, connection: Any, from_getconn: bool) -> Any:
        if from_getconn:  # its check failed: nobody has held it
            meter = meters.of(pool)
            if meter is not None:
                meter.holds.pop(id(connection), None)
        return original(pool, connection, from_getconn)

    return _putconn
