"""The cache probe: look-ups by result, and how long cache operations take.

Redis clients are found by themselves, sync and async, made before or after. Caches inside the process count
through ``cache_result``. Keys never leave the process: only their patterns do (see ``key_pattern``).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary, WeakSet

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.cache_rules import LOOKUPS, SKIPPED, TIMED, keys_of, of_broker, one
from fastapi_headroom.probes.key_pattern import fold
from fastapi_headroom.probes.names import OTHER
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.redis_hooks import PIPELINE, RedisHooks, address_of, owner_of, queued_commands
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Counter, Histogram, Writer

MAX_PATTERNS: Final = 100
"""Key patterns per cache; further ones are ``_OTHER``."""
MAX_CACHES: Final = 20
MAX_KEYS: Final = 500
"""Keys per cache whose pattern is remembered, so that the hot ones need no folding."""
SERIES_KEY: Final = "_fastapi_headroom"
"""The attribute of a client's connection pool (or cluster) that carries its CacheSeries."""
OPERATIONS: Final = {
    **{command: command.lower() for command in (*LOOKUPS, *TIMED)},
    **dict.fromkeys(SKIPPED, ""),
}
_JUDGES: Final = {command.lower(): judge for command, judge in LOOKUPS.items()}
_bound: CacheProbe | None = None
"""The probe that measures. redis-py's classes are the process's, so there is one at a time: the last one bound."""


class Results:
    """The look-ups of one cache and key pattern."""

    __slots__ = ("_arguments", "_error", "hit", "miss")

    def __init__(self, writer: Writer, cache: str, pattern: str) -> None:
        self._arguments = (writer, cache, pattern)
        self._error: Counter | None = None
        # both from the start: the first sample of a new series gives no increase, and a ratio needs the two
        self.hit: Counter = writer.counter(catalog.CACHE_REQUESTS, cache, pattern, "hit")
        self.miss: Counter = writer.counter(catalog.CACHE_REQUESTS, cache, pattern, "miss")

    def error(self) -> Counter:
        """Return the counter of errors, made at the first one."""
        if self._error is None:
            writer, cache, pattern = self._arguments
            self._error = writer.counter(catalog.CACHE_REQUESTS, cache, pattern, "error")
        return self._error


class CacheSeries:
    """The series of one cache, with their handles resolved once."""

    __slots__ = ("_known", "name", "operations", "patterns", "writer")

    def __init__(self, writer: Writer, name: str) -> None:
        self._known: dict[str | bytes, Results | None] = {}
        self.writer = writer
        self.name = name
        self.operations: dict[str, Histogram] = {}
        self.patterns: dict[str, Results] = {}

    def observe(self, operation: str, seconds: float) -> None:
        """Record how long an operation took."""
        handle = self.operations.get(operation)
        if handle is None:
            handle = self.writer.histogram(catalog.CACHE_OPERATION_DURATION, self.name, operation)
            self.operations[operation] = handle
        handle.observe(seconds)

    def look_up(self, key: Any) -> Results | None:
        """Return the counters of the pattern that ``key`` folds to, None for a key of a task queue."""
        hashes = type(key) is str or type(key) is bytes
        if hashes and key in self._known:
            return self._known[key]
        results = None if of_broker(key) else self.results(key)
        if hashes:
            if len(self._known) >= MAX_KEYS:
                self._known.clear()
            self._known[key] = results
        return results

    def results(self, key: Any) -> Results:
        """Return the counters of the pattern that ``key`` folds to."""
        pattern = fold(key)
        results = self.patterns.get(pattern)
        if results is None:
            if len(self.patterns) >= MAX_PATTERNS:
                pattern = OTHER
            results = self.patterns.get(pattern)
            if results is None:
                results = self.patterns[pattern] = Results(self.writer, self.name, pattern)
        return results


class CacheProbe:
    """Measures Redis clients, and the in-process caches that report to it."""

    name: ClassVar[str] = "cache"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.CACHE_REQUESTS,
        catalog.CACHE_OPERATION_DURATION,
        catalog.CACHE_ENTRY_AGE,
        catalog.CACHE_CONCURRENT_FILLS,
        catalog.CACHE_DUPLICATE_FILLS,
        catalog.CACHE_PAYLOAD,
        catalog.CACHE_TIMEOUTS,
        catalog.CACHE_INVALIDATIONS,
    )

    def __init__(self, settings: Settings, names: Mapping[str, Any] | None = None) -> None:
        """Prepare to measure. ``names`` gives caches names of the user's choice: ``{"main": client}``."""
        self.settings = settings
        self.guard = Guard(self.name)
        self.writer: Writer | None = None
        self._lock = threading.Lock()
        self._patches = Patches()
        self._hooks: RedisHooks | None = None
        self._series: dict[str, CacheSeries] = {}
        self._owners: WeakSet[Any] = WeakSet()
        """What carries a CacheSeries."""
        self._names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self.name_clients(names or {})

    def name_clients(self, names: Mapping[str, Any]) -> None:
        """Give Redis clients names of the user's choice. Raises SettingsError for what is no client."""
        for given, client in names.items():
            if not hasattr(client, "execute_command"):
                raise SettingsError(
                    f"caches={{{given!r}: {type(client).__name__}}} is no Redis client; give a redis.Redis, "
                    "redis.asyncio.Redis or a cluster client"
                )
            self._names[owner_of(client)] = given
            vars(owner_of(client)).pop(SERIES_KEY, None)

    def bind(self, writer: Writer) -> None:
        """Resolve handles, and attach hooks if the app uses redis-py (else ``sample`` looks again)."""
        global _bound
        if _bound is not None and _bound is not self:
            _bound.close()
        _bound = self
        self._lock = threading.Lock()  # a fork may have left the old one held by a thread that is no more
        self._series = {}
        self.writer = writer
        self.guard.bind(writer)
        self._hook()

    def _hook(self) -> None:
        if self._hooks is None and "redis" in sys.modules:
            # importing it for an app that does not use it would cost start-up time and memory
            self._hooks = RedisHooks(self, self._patches, OPERATIONS)
            self._hooks.attach()

    def sample(self) -> None:
        """Attach the hooks to a redis-py that was imported since."""
        if self.writer is not None:
            self._hook()

    def close(self) -> None:
        """Put redis-py back as it was. Idempotent."""
        global _bound
        if _bound is self:
            _bound = None
        self.writer = None
        self._patches.restore()
        self._hooks = None
        for owner in tuple(self._owners):
            vars(owner).pop(SERIES_KEY, None)
        self._owners.clear()

    def operation(self, args: Sequence[Any]) -> str:
        """Return the name under which a command is timed; "" for one that is left alone."""
        if self.writer is None:
            return ""
        try:
            operation = OPERATIONS.get(args[0])
            if operation is None:
                command = args[0]
                text = command.decode("ascii", "replace") if isinstance(command, bytes) else str(command)
                operation = OPERATIONS.get(text.upper(), "other")
            return operation
        except Exception as failure:
            self.guard.failed(failure)
            return ""

    def commands(self, pipeline: Any) -> list[Sequence[Any]]:
        """Return what a pipeline is about to send; nothing if none of it belongs to a cache."""
        if self.writer is None:
            return []
        try:
            commands = queued_commands(pipeline)
            return commands if any(self.operation(args) for args in commands) else []
        except Exception as failure:
            self.guard.failed(failure)
            return []

    def command_done(self, client: Any, operation: str, args: Sequence[Any], seconds: float, reply: Any) -> None:
        """Record a command that was answered."""
        try:
            series = self._series_of(client)
            series.observe(operation, seconds)
            self._judge(series, operation, args, reply)
        except Exception as failure:
            self.guard.failed(failure)

    def command_failed(self, client: Any, operation: str, args: Sequence[Any], seconds: float) -> None:
        """Record a command that raised."""
        try:
            series = self._series_of(client)
            series.observe(operation, seconds)
            self._count_errors(series, operation, args)
        except Exception as failure:
            self.guard.failed(failure)

    def pipeline_done(self, pipeline: Any, commands: Sequence[Sequence[Any]], seconds: float, replies: Any) -> None:
        """Record a pipeline, and the look-ups in it by the positions of their replies."""
        try:
            series = self._series_of(pipeline)
            series.observe(PIPELINE, seconds)
            for args, reply in zip(commands, replies, strict=False):
                self._judge(series, self.operation(args), args, reply)
        except Exception as failure:
            self.guard.failed(failure)

    def pipeline_failed(self, pipeline: Any, commands: Sequence[Sequence[Any]], seconds: float) -> None:
        """Record a pipeline that raised: none of its look-ups gave the app an answer."""
        try:
            series = self._series_of(pipeline)
            series.observe(PIPELINE, seconds)
            for args in commands:
                self._count_errors(series, self.operation(args), args)
        except Exception as failure:
            self.guard.failed(failure)

    def count(self, cache: str, pattern: str, hit: bool) -> None:
        """Count one look-up in a cache inside the process."""
        try:
            if self.writer is not None:
                results = self._series_named(cache).results(pattern)
                (results.hit if hit else results.miss).inc()
        except Exception as failure:
            self.guard.failed(failure)

    def _judge(self, series: CacheSeries, operation: str, args: Sequence[Any], reply: Any) -> None:
        judge = _JUDGES.get(operation)
        if judge is None:
            return
        first = series.look_up(args[1])
        if first is None:
            return
        if isinstance(reply, Exception):
            self._count_errors(series, operation, args)
        elif judge is one:
            (first.miss if reply is None else first.hit).inc()
        else:
            for key, found in judge(args, reply):
                results = series.results(key)
                (results.hit if found else results.miss).inc()

    def _count_errors(self, series: CacheSeries, operation: str, args: Sequence[Any]) -> None:
        if operation in _JUDGES:
            for key in keys_of(operation, args):
                results = series.look_up(key)
                if results is not None:
                    results.error().inc()

    def _series_of(self, client: Any) -> CacheSeries:
        owner = client.__dict__.get("connection_pool") or owner_of(client)
        series: CacheSeries | None = owner.__dict__.get(SERIES_KEY)
        if series is None or series.writer is not self.writer:
            series = self._series_named(self._names.get(owner) or address_of(client))
            setattr(owner, SERIES_KEY, series)
            self._owners.add(owner)
        return series

    def _series_named(self, name: str) -> CacheSeries:
        series = self._series.get(name)
        if series is None:
            with self._lock:
                writer = self.writer
                assert writer is not None
                if name not in self._series and len(self._series) >= MAX_CACHES:
                    name = OTHER
                series = self._series.setdefault(name, CacheSeries(writer, name))
        return series


def cache_result(name: str, hit: bool, key_pattern: str = "") -> None:
    """Count one look-up in a cache inside the process, such as a dictionary or ``cachetools``.

    ``name`` is the cache's name, ``key_pattern`` says what was looked up (``org:{}:plan``); a raw key given by
    mistake is folded to its pattern. Does nothing while nothing is measured.
    """
    if _bound is not None:
        _bound.count(name, key_pattern, hit)
