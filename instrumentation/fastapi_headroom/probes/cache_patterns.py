"""The counters of look-ups by key pattern, found by key: folded, learned, and bounded."""

from __future__ import annotations

import threading
from typing import Any, Final, Literal

from fastapi_headroom import catalog
from fastapi_headroom.probes.cache_ages import LifeTime
from fastapi_headroom.probes.cache_rules import BROKER_KEYS, of_broker
from fastapi_headroom.probes.key_learning import FullError, Learned
from fastapi_headroom.probes.key_pattern import SEPARATORS, fold
from fastapi_headroom.probes.names import OTHER
from fastapi_headroom.store.writer import Counter, Writer

MAX_PATTERNS: Final = 100
"""Key patterns per cache at a time; further ones are ``_OTHER``."""
MAX_PATTERNS_EVER: Final = 300
"""Key patterns per cache that ever had a series: some are left behind when positions are learned."""
MAX_KEYS: Final = 500
"""Keys per cache whose pattern is remembered, so that the hot ones need no folding."""
NEW: Final[Any] = object()
"""Stands for the results of a key that is not known."""


class Owed:
    """Stands for a counter that said too much: lets go by what it is owed, then puts the counter back.

    So the path of a look-up costs nothing more, and a counter never falls.
    """

    __slots__ = ("_counter", "_kind", "_results", "number")

    def __init__(self, results: Results, kind: Literal["hit", "miss"], counter: Counter) -> None:
        self._results, self._kind, self._counter = results, kind, counter
        self.number = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Count what goes beyond what is owed."""
        with self._results.owing:
            paid = min(amount, self.number)
            self.number -= paid
            if not self.number:
                setattr(self._results, self._kind, self._counter)
        if amount > paid:
            self._counter.inc(amount - paid)


class Results:
    """The look-ups of one cache and key pattern."""

    __slots__ = ("_cache", "_duplicates", "_pattern", "_writer", "hit", "lifetime", "miss", "owing")

    def __init__(self, writer: Writer, cache: str, pattern: str) -> None:
        self._writer = writer
        self._cache = cache
        self._pattern = pattern
        self._duplicates: Counter | None = None
        self.lifetime = LifeTime()
        self.owing = threading.Lock()  # one each: they are made anew after a fork, which may leave a lock held
        # both from the start: the first sample of a new series gives no increase, and a ratio needs the two
        self.hit: Counter | Owed = self.other("hit")
        self.miss: Counter | Owed = self.other("miss")

    def other(self, result: str) -> Counter:
        """Return the counter of a result, made at the first one."""
        return self._writer.counter(catalog.CACHE_REQUESTS, self._cache, self._pattern, result)

    def was_stale(self, kind: Literal["hit", "miss"]) -> None:
        """Count a look-up as stale that was counted as a hit or a miss already: the next one of that kind is not."""
        self.other("stale").inc()
        with self.owing:
            counter = getattr(self, kind)
            if not isinstance(counter, Owed):
                counter = Owed(self, kind, counter)
                setattr(self, kind, counter)
            counter.number += 1.0

    def duplicates(self) -> Counter:
        """Return the counter of misses while the key was being filled; it is there from the first miss on."""
        if self._duplicates is None:
            self._duplicates = self._writer.counter(catalog.CACHE_DUPLICATE_FILLS, self._cache, self._pattern)
        return self._duplicates

    def invalidations(self) -> Counter:
        """Return the counter of entries that the app threw away."""
        return self._writer.counter(catalog.CACHE_INVALIDATIONS, self._cache, self._pattern)


class Patterns:
    """The results of one cache. ``known`` is for the hot path: results by key, None for a key of a task queue."""

    __slots__ = ("_cache", "_ever", "_learned", "_named", "_patterns", "_shown", "_writer", "known")

    def __init__(self, writer: Writer, cache: str) -> None:
        self._writer = writer
        self._cache = cache
        self.known: dict[str | bytes, Results | None] = {}
        self._patterns: dict[str, Results] = {}
        """Results by pattern before anything is learned."""
        self._shown: dict[str, Results] = {}
        """Results by pattern as the label shows it."""
        self._named: dict[str, Results] = {}
        """Results by a name that the app gave."""
        self._learned = Learned()
        self._ever = 0

    def look_up(self, key: Any) -> Results | None:
        """Return the counters of the pattern that ``key`` folds to, None for a key of a task queue."""
        try:
            results = self.known.get(key, NEW)
        except TypeError:
            key, results = bytes(key), NEW
        return self.look_up_new(key) if results is NEW else results

    def look_up_new(self, key: Any) -> Results | None:
        """Do the same for a key that is not known."""
        if type(key) is str:  # spelled out for keys that are ever new
            results = None if key.startswith(BROKER_KEYS) else self._patterns.get(fold(key)) or self.results(key)
        else:
            results = None if of_broker(key) else self.results(key)
            if type(key) is not bytes:
                return results
        known = self.known
        if len(known) >= MAX_KEYS:
            known.clear()
        known[key] = results
        return results

    def results(self, key: Any) -> Results:
        """Return the counters of the pattern that ``key`` folds to."""
        pattern = fold(key)
        results = self._patterns.get(pattern)
        if results is None:
            results = self._show(self._learn(pattern))
            if len(self._patterns) >= MAX_KEYS:
                self._patterns.clear()
            self._patterns[pattern] = results
        return results

    def given(self, pattern: str) -> Results:
        """Return the counters of a pattern that the app names itself: one word is a name, nothing to learn from."""
        results = self._named.get(pattern)
        if results is not None:
            return results
        folded = fold(pattern)
        if folded != pattern or SEPARATORS.search(folded):
            return self.results(folded)
        name = pattern if len(self._named) < MAX_PATTERNS else OTHER
        results = self._named.get(name)
        if results is None:
            results = self._named[name] = Results(self._writer, self._cache, name)
        return results

    def _learn(self, pattern: str) -> str:
        before = self._learned.folds
        try:
            learned = self._learned(pattern)
            if self._learned.folds != before:  # what was shown before may have another name now
                self.known.clear()
                self._patterns.clear()
                self._shown = {shown: results for shown, results in self._shown.items() if self._holds(shown)}
            return learned
        except FullError:
            return OTHER

    def _holds(self, shown: str) -> bool:
        return shown == OTHER or self._learned(shown) == shown

    def _show(self, pattern: str) -> Results:
        results = self._shown.get(pattern)
        if results is None:
            if len(self._shown) >= MAX_PATTERNS or self._ever >= MAX_PATTERNS_EVER:
                pattern = OTHER
            results = self._shown.get(pattern)
            if results is None:
                self._ever += 1
                results = self._shown[pattern] = Results(self._writer, self._cache, pattern)
        return results
