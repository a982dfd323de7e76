"""Cache: whether it still takes the load off the database."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, cache_levels, cache_rows, promql
from fastapi_headroom.pack.board import Variable
from fastapi_headroom.pack.cache_queries import LABELS, MISS, PATTERN, hit_ratio, lookups
from fastapi_headroom.pack.rules import JOB, Rule

UID = "headroom-cache"
_VARIABLES = (*JOB, ("cache", "cache"))


def _usual(offset: str) -> str:
    floor = promql.number(thresholds.CACHE_LOOKUPS_FLOOR)
    return f"{promql.block(hit_ratio('1h', offset=offset))}\nand {lookups('1h', offset=offset)} > {floor}"


def _low() -> str:
    # A day ago knows the hour's habits. A cache younger than that is compared with the hour before instead.
    usual = promql.block(f"{_usual('1d')}\nor {_usual('10m')}")
    busy = f"{lookups('5m')} > {promql.number(thresholds.CACHE_LOOKUPS_FLOOR)}"
    return f"{promql.block(hit_ratio('5m'))} < {promql.number(thresholds.CACHE_DROP)} * {usual}\nand {busy}"


def _of_pattern(window: str, matcher: str) -> str:
    return promql.by("sum", PATTERN, promql.rate(catalog.CACHE_REQUESTS, window, matcher))


def _stale() -> str:
    stale = _of_pattern("5m", 'result="stale"')
    every = lookups("5m", labels=PATTERN)
    floor = promql.number(thresholds.CACHE_LOOKUPS_FLOOR)
    return f"{stale} / {every} > {promql.number(thresholds.CACHE_STALE_SHARE)}\nand {every} > {floor}"


def _stampede() -> str:
    duplicates = promql.by("sum", PATTERN, promql.rate(catalog.CACHE_DUPLICATE_FILLS, "5m"))
    misses = _of_pattern("5m", MISS)
    floor = promql.number(thresholds.CACHE_DUPLICATES_FLOOR)
    return f"{duplicates} / {misses} > {promql.number(thresholds.CACHE_DUPLICATE_SHARE)}\nand {duplicates} > {floor}"


def _errors() -> str:
    errors = promql.by("sum", LABELS, promql.rate(catalog.CACHE_REQUESTS, "5m", 'result="error"'))
    every = promql.by("sum", LABELS, promql.rate(catalog.CACHE_REQUESTS, "5m"))
    floor = promql.number(thresholds.CACHE_LOOKUPS_FLOOR)
    return f"{errors} / {every} > {promql.number(thresholds.CACHE_ERROR_SHARE)}\nand {every} > {floor}"


def _memory() -> str:
    # Every instance's sidecar may poll the same server: the highest of what they say, never the sum.
    held = promql.by("max", LABELS, promql.highest(catalog.CACHE_MEMORY, "5m"))
    limit = promql.by("max", LABELS, promql.highest(catalog.CACHE_MEMORY_LIMIT, "5m"))
    refuses = promql.series(catalog.CACHE_SERVER_INFO, 'eviction_policy="noeviction"')
    return (
        f"{held} / {limit} > {promql.number(thresholds.CACHE_MEMORY_SHARE)}\n"
        f"and on (job, cache) {promql.by('group', LABELS, refuses)}"
    )


RULES = (
    Rule(
        name="CacheHitRatioLow",
        expression=_low(),
        severity="warning",
        pending="5m",
        summary="The cache answers less than half of what it usually does.",
        description=(
            "{{ $labels.job }}: cache {{ $labels.cache }} answers {{ $value | humanizePercentage }} of look-ups, "
            "less than half of a day ago; the rest falls on the database."
        ),
        board=UID,
        variables=_VARIABLES,
    ),
    Rule(
        name="CacheStale",
        expression=_stale(),
        severity="warning",
        pending="5m",
        summary="The app serves entries of the cache that it knows to be out of date.",
        description=(
            "{{ $labels.job }}: cache {{ $labels.cache }} answers {{ $value | humanizePercentage }} of look-ups for "
            "{{ $labels.key_pattern }} out of date: what invalidates or renews these entries does not get through."
        ),
        board=UID,
        variables=_VARIABLES,
    ),
    Rule(
        name="CacheStampede",
        expression=_stampede(),
        severity="warning",
        pending="2m",
        summary="Many requests miss one key at once, and each of them works out the same value.",
        description=(
            "{{ $labels.job }}: {{ $value | humanizePercentage }} of the misses of {{ $labels.key_pattern }} in cache "
            "{{ $labels.cache }} come while another request is filling the same key."
        ),
        board=UID,
        variables=_VARIABLES,
    ),
    Rule(
        name="CacheErrors",
        expression=_errors(),
        severity="warning",
        pending="2m",
        summary="Look-ups in the cache fail.",
        description=(
            "{{ $labels.job }}: {{ $value | humanizePercentage }} of look-ups in cache {{ $labels.cache }} fail; they "
            "cost time, and what they would have answered falls on the database."
        ),
        board=UID,
        variables=_VARIABLES,
    ),
    Rule(
        name="CacheMemoryNearLimit",
        expression=_memory(),
        severity="warning",
        pending="5m",
        summary="A cache server is nearly full, and it is told to refuse writes then.",
        description=(
            "{{ $labels.job }}: cache {{ $labels.cache }} holds {{ $value | humanizePercentage }} of its memory limit, "
            "and its eviction policy is noeviction: at the limit every write fails."
        ),
        board=UID,
        variables=_VARIABLES,
    ),
)


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Cache",
        "Does the cache still take the load off the database, level by level, and which keys miss?",
        (
            cache_rows.first(),
            cache_rows.ratio(),
            cache_levels.levels(),
            cache_rows.stale(),
            cache_rows.trouble(),
            cache_rows.keys(),
            cache_levels.servers(),
            cache_levels.contents(),
            cache_levels.in_process(),
            cache_rows.details(),
        ),
        (Variable("cache", catalog.CACHE_REQUESTS, "cache", "Cache"),),
    )
