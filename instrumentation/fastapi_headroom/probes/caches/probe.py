"""The probe for all caches that are not redis-py's: those inside the process, and other libraries'."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.caches.aiocache import Aiocache
from fastapi_headroom.probes.caches.cachetools import CountedCache, held_by, is_cache
from fastapi_headroom.probes.caches.cashews import Cashews
from fastapi_headroom.probes.caches.fastapi_cache import FastapiCache
from fastapi_headroom.probes.caches.finder import Finder, is_cached
from fastapi_headroom.probes.caches.library import Library, Recorder
from fastapi_headroom.probes.caches.memcached import Aiomcache, Pymemcache
from fastapi_headroom.probes.caches.source import InfoSource, Reading, Source
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.store.writer import Counter, Gauge, Writer

LIBRARIES: Final[tuple[type[Library], ...]] = (Aiocache, Cashews, FastapiCache, Pymemcache, Aiomcache)
MAX_NAMES: Final = 50
"""Caches that get series of their own; later ones share ``_OTHER``."""
_LENGTH: Final = 80
_NEW: Final = Reading(0, 0, 0)


class LocalCachesProbe:
    """Measures caches inside the process and of other libraries. Switched with the cache probe, whose stem it has.

    ``functools.lru_cache`` and cachetools are read at the sampling interval, on the sampling thread; what other
    libraries answer goes through ``cache``.
    """

    name: ClassVar[str] = "cache"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.CACHE_REQUESTS,
        catalog.CACHE_ENTRIES,
        catalog.CACHE_ENTRIES_LIMIT,
        catalog.CACHE_EVICTIONS,
    )

    def __init__(self, cache: CacheProbe) -> None:
        self.guard = Guard(self.name)
        self._recorder = Recorder(cache)
        self._libraries = [_Attached(library(), self._recorder) for library in LIBRARIES]
        self._writer: Writer | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._inherits = False
        self._finder = Finder()
        self._named: list[tuple[str, Any]] = []
        self._known: dict[int, _Cache] = {}
        """By the identity of what holds the entries."""
        self._series: dict[str, LocalSeries] = {}
        self._folded = BoundedNames(MAX_NAMES)

    def name_caches(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Give caches names of the user's choice. Returns what is none of ours."""
        ours = {name: thing for name, thing in names.items() if _is_ours(thing)}
        with self._lock:
            self._named += ours.items()
        for name, thing in names.items():
            if name not in ours and any(library.owns(thing) for library in self._libraries):
                ours[name] = thing
                self._recorder.names[id(thing)] = (name, thing)
        return {name: thing for name, thing in names.items() if name not in ours}

    def bind(self, writer: Writer) -> None:
        """Resolve handles. A fork's child begins at 0: what its parent's caches counted is not its own."""
        self._lock = threading.Lock()  # a fork may have left the old one held by a thread that is no more
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._inherits = os.getpid(), True
                for cache in self._known.values():
                    cache.last = self._read(cache) or cache.last
            self._writer = writer
            self._series = {}
            self._folded = BoundedNames(MAX_NAMES)
            self.guard.bind(writer)
            self._attach()
            self._read_all(writer, self._named)  # now: a class that counts has to come before the first look-up

    def sample(self) -> None:
        """Look for caches of modules that were imported since, and write what all of them say."""
        with self._lock:
            if self._writer is not None:
                self._attach()
                self._read_all(self._writer, [*self._named, *self._finder.look()])

    def close(self) -> None:
        """Put the caches back as they were and forget what was found. Idempotent."""
        with self._lock:
            self._writer = None
            for cache in self._known.values():
                cache.source.release()
            self._known.clear()
            self._finder = Finder()
            for library in self._libraries:
                library.detach()

    def _attach(self) -> None:
        for library in self._libraries:
            try:
                library.attach()
            except Exception as failure:
                self.guard.failed(failure)

    def _read_all(self, writer: Writer, candidates: Iterable[tuple[str, Any]]) -> None:
        readings: dict[str, list[Reading]] = {name: [] for name in self._series}
        for key in list(self._known):
            self._write(writer, key, readings)
        for name, thing in candidates:
            if (key := id(_holder(thing))) not in self._known and self._add(key, name, thing):
                self._write(writer, key, readings)
        for name, of_name in readings.items():
            self._series[name].write(of_name)

    def _add(self, key: int, name: str, thing: Any) -> bool:
        holder = _holder(thing)
        try:
            source: Source = CountedCache(holder) if is_cache(holder) else InfoSource(thing)
        except TypeError:
            return False  # a class that nothing can be derived from: what cannot be counted has no series
        cache = self._known[key] = _Cache(name[:_LENGTH], source)
        if self._inherits:
            cache.last = self._read(cache) or cache.last
        return True

    def _write(self, writer: Writer, key: int, readings: dict[str, list[Reading]]) -> None:
        cache = self._known[key]
        reading = self._read(cache)
        if reading is None:
            del self._known[key]
            return
        name = self._folded(cache.name)
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = LocalSeries(writer, name)
        series.count(cache.last, reading)
        cache.last = reading
        readings.setdefault(name, []).append(reading)

    def _read(self, cache: _Cache) -> Reading | None:
        try:
            return cache.source.read()
        except Exception as failure:
            self.guard.failed(failure)
            return None


class _Attached:
    """A library with its patches, so that one that fails does not take the others along."""

    def __init__(self, library: Library, recorder: Recorder) -> None:
        self._library, self._recorder = library, recorder
        self._patches = Patches()
        self._attached = False

    def attach(self) -> None:
        """Wrap the library once, when the app has imported it. Raises what a version that does not fit raises, once."""
        if self._attached or self._library.module not in sys.modules:
            return
        self._attached = True
        try:
            self._library.attach(self._recorder, self._patches)
        except Exception:
            self._patches.restore()
            raise

    def detach(self) -> None:
        """Put the library back as it was. Idempotent."""
        self._attached = False
        self._patches.restore()

    def owns(self, thing: Any) -> bool:
        """Return whether something is a cache or a client of this library."""
        return self._library.module in sys.modules and self._library.owns(thing)


class _Cache:
    """One cache that is measured."""

    __slots__ = ("last", "name", "source")

    def __init__(self, name: str, source: Source) -> None:
        self.name, self.source = name, source
        self.last = _NEW
        """What was written of it already."""


class LocalSeries:
    """The series of one name. Several caches may share it; the gauges are their sum."""

    __slots__ = ("_entries", "_evictions", "_hit", "_limit", "_miss", "_name", "_writer")

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer, self._name = writer, name
        # both from the start: the first sample of a new series gives no increase, and a ratio needs the two
        self._hit: Counter = writer.counter(catalog.CACHE_REQUESTS, name, "", "hit")
        self._miss: Counter = writer.counter(catalog.CACHE_REQUESTS, name, "", "miss")
        self._entries: Gauge = writer.gauge(catalog.CACHE_ENTRIES, name)
        self._limit: Gauge | None = None
        self._evictions: Counter | None = None

    def count(self, last: Reading, now: Reading) -> None:
        """Add what came since the last reading. A cache that was emptied has begun anew."""
        if now.hits < last.hits or now.misses < last.misses:
            last = _NEW
        self._hit.inc(now.hits - last.hits)
        self._miss.inc(now.misses - last.misses)
        if now.evictions is not None:
            if self._evictions is None:
                self._evictions = self._writer.counter(catalog.CACHE_EVICTIONS, self._name)
            self._evictions.inc(now.evictions - (last.evictions or 0))

    def write(self, readings: list[Reading]) -> None:
        """Write the gauges: the sum over the caches of this name."""
        self._entries.set(sum(reading.size for reading in readings))
        limits = [reading.limit for reading in readings if reading.limit is not None]
        if limits and self._limit is None:
            self._limit = self._writer.gauge(catalog.CACHE_ENTRIES_LIMIT, self._name)
        if self._limit is not None:
            self._limit.set(sum(limits))


def _holder(thing: Any) -> Any:
    """Return what holds the entries: the cache behind a decorated function, or the thing itself."""
    held = held_by(thing)
    return thing if held is None else held


def _is_ours(thing: Any) -> bool:
    return is_cache(thing) or is_cached(thing) or callable(getattr(thing, "cache_info", None))
