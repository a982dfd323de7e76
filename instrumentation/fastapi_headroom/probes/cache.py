"""The cache probe: look-ups by result, their ages, stampedes and sizes, and how long cache operations take.

Redis clients are found by themselves, sync and async, made before or after. Caches inside the process count
through ``cache_result``. Keys never leave the process: only their patterns do (see ``key_pattern``).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary, WeakSet

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.cache_books import SERIES_KEY, Books, before
from fastapi_headroom.probes.cache_commands import COMMANDS, PIPELINE, TELLS_LEFT, Command, command_of
from fastapi_headroom.probes.cache_series import CacheSeries
from fastapi_headroom.probes.names import OTHER
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.redis_hooks import (
    RedisHooks,
    address_of,
    answered_locally,
    keeps_local_cache,
    owner_of,
    queued_commands,
)
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer

MAX_CACHES: Final = 20
Queued = list[tuple[Command, Sequence[Any]] | None]
"""The commands of a pipeline with their arguments; None for one that is left alone."""
_bound: CacheProbe | None = None
"""The probe that measures. redis-py's classes are the process's, so there is one at a time: the last one bound."""


class HiddenError(Exception):
    """Stands for an error of the probe in logs. The text of the error itself may hold a key."""


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
        self._timeouts: tuple[type[Exception], ...] = (TimeoutError,)
        self._conflicts: tuple[type[Exception], ...] = ()
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
            from redis.exceptions import TimeoutError as RedisTimeoutError
            from redis.exceptions import WatchError

            self._timeouts = (TimeoutError, RedisTimeoutError)
            self._conflicts = (WatchError,)
            self._hooks = RedisHooks(self, self._patches, COMMANDS)
            self._hooks.attach()

    def sample(self) -> None:
        """Attach the hooks to a redis-py that was imported since, and look which fills have ended."""
        if self.writer is not None:
            self._hook()
            now = perf_counter()
            for series in tuple(self._series.values()):
                series.sweep(now)

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

    def command(self, args: Sequence[Any]) -> Command | None:
        """Return the command that is called, however it is written; None for one that is left alone."""
        if self.writer is None:
            return None
        try:
            word = args[0]
            try:
                return COMMANDS[word]
            except (KeyError, TypeError):
                return command_of(word)
        except Exception as failure:
            self._failed(failure)
            return None

    def commands(self, pipeline: Any) -> Queued:
        """Return what a pipeline is about to send; nothing if none of it belongs to a cache."""
        if self.writer is None:
            return []
        try:
            queued: Queued = []
            for args in queued_commands(pipeline):
                command = self.command(args)
                queued.append(None if command is None else (command, args))
            return queued if any(queued) else []
        except Exception as failure:
            self._failed(failure)
            return []

    def command_done(
        self,
        client: Any,
        command: Command,
        args: Sequence[Any],
        reply: Any,
        seconds: float,
        now: float,
        request: Ledger | None,
    ) -> None:
        """Record a command that was answered ``now``, after so many seconds."""
        try:
            try:
                series = client.__dict__["connection_pool"].__dict__[SERIES_KEY]
                if series.writer is not self.writer:
                    series = self._series_of(client)
            except KeyError:
                series = self._series_of(client)
            local = series.local
            if local is not None:
                served = answered_locally()
                if served:
                    local.answered(command, args, reply, seconds, now, request)
                    return
                if served is not None:
                    local.missed_all(command, args)
            series.answered(command, args, reply, seconds, now, request)
        except Exception as failure:
            self._failed(failure)

    def command_failed(
        self, client: Any, command: Command, args: Sequence[Any], error: Exception, seconds: float
    ) -> None:
        """Record a command that raised after so many seconds."""
        try:
            series = self._series_of(client)
            if series.local is not None:
                answered_locally()
            series.observe(command, seconds)
            series.count_errors(command, args)
            if isinstance(error, self._timeouts):
                series.count_timeout()
        except Exception as failure:
            self._failed(failure)

    def pipeline_done(
        self, pipeline: Any, queued: Queued, replies: Any, seconds: float, now: float, request: Ledger | None
    ) -> None:
        """Record a pipeline, and the commands in it by the positions of their replies."""
        try:
            series = self._series_of(pipeline)
            series.observe(PIPELINE, seconds)
            answers = [(*entry, reply) for entry, reply in zip(queued, replies, strict=False) if entry is not None]
            # what tells an age comes first: GET and PTTL are often sent together, in this order
            answers.sort(key=lambda answer: answer[0].name not in TELLS_LEFT)
            for command, args, reply in answers:
                if isinstance(reply, Exception):
                    series.count_errors(command, args)
                else:
                    series.judge(command, args, reply, now, request)
        except Exception as failure:
            self._failed(failure)

    def pipeline_failed(self, pipeline: Any, queued: Queued, error: Exception, seconds: float) -> None:
        """Record a pipeline that raised: none of its look-ups gave the app an answer.

        A transaction that a watched key put an end to is none of the cache's errors.
        """
        try:
            series = self._series_of(pipeline)
            series.observe(PIPELINE, seconds)
            if isinstance(error, self._conflicts):
                return
            for entry in queued:
                if entry is not None:
                    series.count_errors(*entry)
            if isinstance(error, self._timeouts):
                series.count_timeout()
        except Exception as failure:
            self._failed(failure)

    def count(self, cache: str, pattern: str, hit: bool, *, stale: bool = False, age: float | None = None) -> None:
        """Count one look-up in a cache inside the process."""
        try:
            if self.writer is not None:
                series = self._series_named(cache)
                if stale and series.is_connected:
                    series.patterns.results(pattern).was_stale("hit" if hit else "miss")
                elif stale:
                    series.patterns.given(pattern).other("stale").inc()
                else:
                    results = series.patterns.given(pattern)
                    (results.hit if hit else results.miss).inc()
                if age is not None and 0.0 <= age < float("inf"):
                    series.serve(age)
        except Exception as failure:
            self._failed(failure)

    def invalidated(self, cache: str, pattern: str, number: int) -> None:
        """Count entries that the app threw away."""
        try:
            if self.writer is not None and number > 0:
                self._series_named(cache).patterns.given(pattern).invalidations().inc(number)
        except Exception as failure:
            self._failed(failure)

    def series_named(self, name: str) -> CacheSeries:
        """Return the series of a cache that another library's hooks report."""
        return self._series_named(name)

    def hide(self, failure: Exception) -> None:
        """Take note of an error of another library's hooks; what it says may hold a key."""
        self._failed(failure)

    def _failed(self, failure: Exception) -> None:
        hidden = HiddenError(f"{type(failure).__name__}; what it says is left out, it may hold a key")
        self.guard.failed(hidden.with_traceback(failure.__traceback__))

    def _series_of(self, client: Any) -> CacheSeries | Books:
        owner = client.__dict__.get("connection_pool") or owner_of(client)
        series: CacheSeries | Books | None = owner.__dict__.get(SERIES_KEY)
        if series is None or series.writer is not self.writer:
            cache = self._series_named(self._names.get(owner) or address_of(client)).connected()
            if cache.local is None and keeps_local_cache(owner):
                cache.keep_local()
            series = before(cache, owner)
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


def cache_result(name: str, hit: bool, key_pattern: str = "", *, stale: bool = False, age: float | None = None) -> None:
    """Count one look-up in a cache of your own, such as a dictionary.

    ``name`` is the cache's name, ``key_pattern`` says what was looked up (``org:{}:plan``); a raw key given by
    mistake is folded to its pattern. ``stale=True`` says that the entry was served although it was out of date (as
    while it is renewed, or when its source is down): it counts as ``stale``, whatever ``hit`` says. With the name of a
    Redis client it speaks of a look-up that the probe has counted, as a hit or, with ``hit=False``, a miss: the next
    one of that pattern and kind is then left out, so that none counts twice. ``age`` is the
    time in seconds since the entry that was served was made. Does nothing while nothing is measured.
    """
    if _bound is not None:
        _bound.count(name, key_pattern, hit, stale=stale, age=age)


def cache_invalidated(name: str, key_pattern: str = "", count: int = 1) -> None:
    """Count entries of a cache, of your own or in Redis, that an event made you throw away.

    ``name`` is the cache's name, for a Redis client the one given by ``init(app, caches=...)``; ``key_pattern`` says
    what was thrown away, ``count`` how many entries. Does nothing while nothing is measured.
    """
    if _bound is not None:
        _bound.invalidated(name, key_pattern, count)
