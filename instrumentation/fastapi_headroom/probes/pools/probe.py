"""The probe for the pools that are not SQLAlchemy's: asyncpg's, psycopg_pool's, redis-py's and httpx'."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pool_names import MAX_NAMES
from fastapi_headroom.probes.pools.asyncpg import AsyncpgPools
from fastapi_headroom.probes.pools.holds import MeterHolds
from fastapi_headroom.probes.pools.httpcore import HttpcorePools
from fastapi_headroom.probes.pools.meter import Adapter, Meters
from fastapi_headroom.probes.pools.psycopg import PsycopgPools
from fastapi_headroom.probes.pools.redis import RedisPools
from fastapi_headroom.probes.pools.series import MeterSeries, Reading
from fastapi_headroom.store.writer import Writer

ADAPTERS: Final[tuple[type[Adapter], ...]] = (AsyncpgPools, PsycopgPools, RedisPools, HttpcorePools)
_LENGTH: Final = 80


class OtherPoolsProbe:
    """Measures the pools of other libraries. Switched with the pool probe, whose stem it has."""

    name: ClassVar[str] = "pool"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.POOL_WAIT,
        catalog.POOL_CREATE,
        catalog.POOL_USE,
        catalog.POOL_COUNT,
        catalog.POOL_MAX,
        catalog.POOL_IDLE_MAX,
        catalog.POOL_PENDING,
        catalog.POOL_TIMEOUTS,
        catalog.POOL_INVALIDATIONS,
        catalog.POOL_WAIT_BY_ROUTE,
        catalog.POOL_HOLD_BY_ROUTE,
        catalog.POOL_LONG_HOLDS,
    )

    def __init__(self, hold_threshold: float = 10.0) -> None:
        """Prepare to measure. Connections of databases held for ``hold_threshold`` seconds are reported."""
        self.guard = Guard(self.name)
        self._long_holds = MeterHolds(hold_threshold)
        self._writer: Writer | None = None
        self._lock = threading.Lock()
        self._series: dict[str, MeterSeries] = {}
        self._folded = BoundedNames(MAX_NAMES)
        self._libraries = [_Library(adapter(), self) for adapter in ADAPTERS]

    def name_pools(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Give pools, or the clients that own one, names of the user's choice. Returns what is none of ours."""
        rest = dict(names)
        for given, thing in names.items():
            for library in self._libraries:
                if library.name(given, thing):
                    del rest[given]
                    break
        return rest

    def bind(self, writer: Writer) -> None:
        """Resolve handles, and attach to the libraries that have been imported (``sample`` looks again)."""
        self._lock = threading.Lock()  # a fork may have left the old one held by a thread that is no more
        self._writer = writer
        self._series = {}
        self._folded = BoundedNames(MAX_NAMES)
        self.guard.bind(writer)
        self._long_holds.rearm()
        for library in self._libraries:
            library.meters.forget()
            library.attach()

    def sample(self) -> None:
        """Write the gauges of all pools, and attach to what was imported since."""
        if self._writer is None:
            return
        readings: dict[str, tuple[list[Reading], int]] = {name: ([], 0) for name in list(self._series)}
        for library in self._libraries:
            library.attach()
            for series, reading, pending in library.meters.read():
                found, others = readings.setdefault(series.name, ([], 0))
                if reading is not None:
                    found.append(reading)
                readings[series.name] = (found, others + pending)
        for name, (found, pending) in readings.items():
            self._series[name].write(found, pending)
        databases = [library.meters for library in self._libraries if library.adapter.of_database]
        self._long_holds.look(meter for meters in databases for meter in meters.all())

    def close(self) -> None:
        """Put every library back and forget its pools. Idempotent."""
        self._writer = None
        for library in self._libraries:
            library.detach()

    def series_named(self, name: str) -> MeterSeries | None:
        """Return the series of a name, None while not bound."""
        writer = self._writer
        if writer is None:
            return None
        with self._lock:
            name = self._folded(name[:_LENGTH])
            series = self._series.get(name)
            if series is None:
                series = self._series[name] = MeterSeries(writer, name)
            return series


class _Library:
    """One adapter with its patches, so that one that fails does not take the others along."""

    def __init__(self, adapter: Adapter, probe: OtherPoolsProbe) -> None:
        self.adapter = adapter
        self.meters = Meters(adapter, probe.guard, probe.series_named)
        self._guard = probe.guard
        self._patches = Patches()
        self._attached = False

    @property
    def imported(self) -> bool:
        return all(module in sys.modules for module in self.adapter.modules)

    def attach(self) -> None:
        """Wrap the library once, when the app has imported it."""
        if self._attached or not self.imported:
            return
        self._attached = True  # first: a version that does not fit is an error once, not each second
        try:
            self.adapter.attach(self.meters, self._patches)
        except Exception as failure:
            self._patches.restore()
            self._guard.failed(failure)

    def detach(self) -> None:
        """Put the library back."""
        self._attached = False
        self.meters.forget()
        self._patches.restore()

    def name(self, given: str, thing: Any) -> bool:
        """Name a pool; return False if it is none of this library."""
        pool = self.adapter.pool_of(thing) if self.imported else None
        if pool is not None:
            self.meters.give_name(pool, given)
        return pool is not None
