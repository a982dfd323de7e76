"""What rules and panels ask of caches."""

from __future__ import annotations

from fastapi_headroom import catalog
from fastapi_headroom.pack import promql

HITS = 'result=~"hit|stale"'
LOOKUPS = 'result=~"hit|stale|miss"'
MISS = 'result="miss"'
CACHES = 'cache=~"$cache"'
"""The caches that the reader of a board chose."""
LABELS = ("job", "cache")
PATTERN = (*LABELS, "key_pattern")
_ON = "on (job, instance, cache)"


def lookups(window: str, *matchers: str, labels: tuple[str, ...] = LABELS, offset: str = "") -> str:
    """Return look-ups per second that were answered with a hit or a miss."""
    return promql.by("sum", labels, promql.rate(catalog.CACHE_REQUESTS, window, *matchers, LOOKUPS, offset=offset))


def hit_ratio(window: str, *matchers: str, labels: tuple[str, ...] = LABELS, offset: str = "") -> str:
    """Return the share of look-ups that were answered from the cache."""
    hits = promql.by("sum", labels, promql.rate(catalog.CACHE_REQUESTS, window, *matchers, HITS, offset=offset))
    return promql.ratio(hits, lookups(window, *matchers, labels=labels, offset=offset))


def served(labels: tuple[str, ...], *matchers: str) -> str:
    """Return look-ups per second on a board in caches of servers: those whose operations are timed."""
    return promql.by("sum", labels, f"{promql.flow(catalog.CACHE_REQUESTS, *matchers)} and {_ON} {_TIMED}")


def local(labels: tuple[str, ...], *matchers: str) -> str:
    """Return look-ups per second on a board in caches inside the process: those that no server answers."""
    return promql.by("sum", labels, f"{promql.flow(catalog.CACHE_REQUESTS, *matchers)} unless {_ON} {_TIMED}")


def served_ratio(labels: tuple[str, ...], *matchers: str) -> str:
    """Return the hit ratio of servers' caches on a board; that of all caches where there is no server."""
    of_servers = promql.ratio(served(labels, *matchers, HITS), served(labels, *matchers, LOOKUPS))
    of_all = hit_ratio(promql.INTERVAL, *promql.BOARD, *matchers, labels=labels)
    return f"{of_servers}\nor {of_all}"


_TIMED = promql.series(catalog.CACHE_OPERATION_DURATION, *promql.BOARD, suffix="_count")
