"""What is read of a cache inside the process, whatever library it is of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol
from weakref import ref


class Reading(NamedTuple):
    """What a cache says of itself at one moment. Counts are since it was made or emptied."""

    hits: int
    misses: int
    size: float
    """Entries, or what the cache's own measure of size says."""
    limit: float | None = None
    """None where it may hold any number."""
    evictions: int | None = None
    """None where the cache does not tell."""


class Source(Protocol):
    """One cache that is read at the sampling interval."""

    def read(self) -> Reading | None:
        """Return what it says now, None when the cache is gone."""

    def release(self) -> None:
        """Put the cache back as it was. Idempotent."""


class InfoSource:
    """A cache that counts by itself: ``cache_info()`` as ``functools.lru_cache`` has it. Nothing is added to calls."""

    def __init__(self, cached: Any) -> None:
        self._cached = ref(cached)

    def read(self) -> Reading | None:
        """Return what ``cache_info()`` says."""
        cached = self._cached()
        if cached is None:
            return None
        info = cached.cache_info()
        limit = info.maxsize
        return Reading(info.hits, info.misses, info.currsize, None if limit in (None, math.inf) else limit)

    def release(self) -> None:
        """Do nothing: nothing was changed."""
