"""What a Redis holds, told by a few of its keys at a time: which patterns, how large, how idle, and when they expire.

A handful of random keys is looked at every PERIOD seconds, in two round trips. What is seen adds up in counters, so
that shares become exact with time and those of several sidecars add up too. Names are folded as the app's probe folds
them; a key itself is dropped before the next poll.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.key_learning import FullError, Learned
from fastapi_headroom.probes.key_pattern import fold
from fastapi_headroom.probes.queue_adapters import Sample
from fastapi_headroom.probes.queue_adapters.redis_link import Command

PERIOD: Final = 10.0
"""Seconds between two looks."""
MOST: Final = 100
"""Keys that one look may ask for."""
MAX_PATTERNS: Final = 100
"""Patterns that ever have series; further ones are ``_OTHER``, as in the probe."""
_OTHER: Final = "_OTHER"
_EXPIRES: Final = ((60.0, "within_minute"), (3_600.0, "within_hour"), (86_400.0, "within_day"))

Ask = Callable[[list[Command]], list[Any]]
"""Sends commands in one round trip; what the server refuses is an exception in its place."""


class KeySampler:
    """Looks at ``keys`` random keys of one database every PERIOD seconds and adds up what it saw."""

    def __init__(self, cache: str, keys: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare to look; ``cache`` is its name on the boards."""
        self._cache = cache
        self._keys = keys
        self._clock = clock
        self._due = 0.0
        self._learned = Learned()
        self._patterns: set[str] = set()
        self._sums: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def rows(self, ask: Ask) -> list[Sample]:
        """Return what was seen so far, after a look if one is due. Raises what ``ask`` raises, and refusals of
        RANDOMKEY and PTTL; a server that does not tell sizes or idle times has no series of them."""
        now = self._clock()
        if now >= self._due:
            self._look(ask)
            self._due = now + PERIOD
        return [(metric, labels, value) for (metric, labels), value in self._sums.items()]

    def _look(self, ask: Ask) -> None:
        keys = [key for key in map(_sure, ask([("RANDOMKEY",)] * self._keys)) if key is not None]
        commands: list[Command] = []
        for key in keys:
            commands += ("PTTL", key), ("MEMORY", "USAGE", key), ("OBJECT", "IDLETIME", key)
        replies = ask(commands)
        for index, key in enumerate(keys):
            left, size, idle = replies[3 * index : 3 * index + 3]
            if _sure(left) == -2:  # gone meanwhile
                continue
            pattern = self._pattern(key)
            self._add(catalog.CACHE_SAMPLED_KEYS, 1.0, pattern, expires(left))
            if isinstance(size, int):
                self._add(catalog.CACHE_SAMPLED_BYTES, size, pattern)
            if isinstance(idle, int):
                self._add(catalog.CACHE_SAMPLED_IDLE, idle, pattern)

    def _add(self, metric: Metric, value: float, *labels: str) -> None:
        at = metric, (self._cache, *labels)
        self._sums[at] = self._sums.get(at, 0.0) + value

    def _pattern(self, key: bytes) -> str:
        try:
            pattern = self._learned(fold(key))
        except FullError:
            return _OTHER
        if pattern not in self._patterns:
            if len(self._patterns) >= MAX_PATTERNS:
                return _OTHER
            self._patterns.add(pattern)
        return pattern


def expires(left: int) -> str:
    """Return the label for a reply to PTTL, in milliseconds; -1 is a key that stays."""
    if left < 0:
        return "never"
    return next((name for seconds, name in _EXPIRES if left <= 1000 * seconds), "later")


def _sure(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply
