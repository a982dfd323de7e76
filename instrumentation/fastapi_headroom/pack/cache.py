"""Cache: whether it still takes the load off the database."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, palette, panels, promql
from fastapi_headroom.pack.board import Cell, Row, Variable, across
from fastapi_headroom.pack.panels import Column, Query
from fastapi_headroom.pack.rules import JOB, Rule

UID = "headroom-cache"
HITS = 'result=~"hit|stale"'
LOOKUPS = 'result=~"hit|stale|miss"'
_MISS = 'result="miss"'
LABELS = ("job", "cache")
PATTERN = (*LABELS, "key_pattern")
_VARIABLES = (*JOB, ("cache", "cache"))


def lookups(window: str, *matchers: str, labels: tuple[str, ...] = LABELS, offset: str = "") -> str:
    """Return look-ups per second that were answered with a hit or a miss."""
    return promql.by("sum", labels, promql.rate(catalog.CACHE_REQUESTS, window, *matchers, LOOKUPS, offset=offset))


def hit_ratio(window: str, *matchers: str, labels: tuple[str, ...] = LABELS, offset: str = "") -> str:
    """Return the share of look-ups that were answered from the cache."""
    hits = promql.by("sum", labels, promql.rate(catalog.CACHE_REQUESTS, window, *matchers, HITS, offset=offset))
    return promql.ratio(hits, lookups(window, *matchers, labels=labels, offset=offset))


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
    misses = _of_pattern("5m", _MISS)
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


_CACHES = 'cache=~"$cache"'


def _first_row() -> Row:
    ratio = hit_ratio(promql.INTERVAL, *promql.BOARD, _CACHES, labels=())
    errors = promql.by("sum", (), promql.flow(catalog.CACHE_REQUESTS, _CACHES, 'result="error"'))
    seconds = promql.by("sum", (), promql.flow(catalog.REQUEST_STAGE, 'stage="cache"'))
    every = promql.by("sum", (), promql.flow(catalog.REQUESTS))
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Hit ratio",
                "What share of look-ups does the cache answer? What it does not answer falls on the database.",
                "percentunit",
                ratio,
                steps=((None, palette.BAD), (0.5, palette.WARN), (0.8, palette.GOOD)),
                decimals=1,
            ),
            panels.number(
                "Look-ups",
                "How many look-ups per second? A hit ratio on few look-ups says little.",
                "ops",
                lookups(promql.INTERVAL, *promql.BOARD, _CACHES, labels=()),
            ),
            panels.number(
                "Misses",
                "How many look-ups per second fall through to the database?",
                "ops",
                promql.or_zero(promql.by("sum", (), promql.flow(catalog.CACHE_REQUESTS, _CACHES, _MISS))),
            ),
            panels.number(
                "Latency, p99",
                "How long does the slowest operation of a hundred take? A cache slower than the database is none.",
                "s",
                promql.shown_quantile(0.99, catalog.CACHE_OPERATION_DURATION, (), _CACHES),
                steps=((None, palette.GOOD), (0.01, palette.WARN), (0.1, palette.BAD)),
            ),
            panels.number(
                "Errors",
                "How many look-ups per second fail? Failed look-ups are misses that also cost time.",
                "ops",
                promql.or_zero(errors),
                steps=panels.ZERO_IS_GOOD,
            ),
            panels.number(
                "Time per request",
                "How much of a mean request is spent waiting for the cache?",
                "s",
                f"{seconds} / {every}",
            ),
        ),
    )


def _ratio_row() -> Row:
    per_cache = hit_ratio(promql.INTERVAL, *promql.BOARD, _CACHES, labels=("cache",))
    results = promql.by("sum", ("result",), promql.flow(catalog.CACHE_REQUESTS, _CACHES))
    return Row(
        "Does the cache take the load?",
        across(
            9,
            panels.lines(
                "Hit ratio by cache",
                (
                    "Does each cache still answer what it used to? A sudden drop is a flush, an expiry in step, or a "
                    "changed key."
                ),
                "percentunit",
                Query(per_cache, "{{cache}}"),
                maximum=1,
            ),
            panels.lines(
                "Look-ups by result",
                "What do look-ups return? Misses that grow with traffic are normal, misses that grow alone are not.",
                "ops",
                Query(results, "{{result}}"),
                colours=palette.CACHE_RESULTS,
                stacked=True,
            ),
        ),
    )


def _keys_row() -> Row:
    keys = ("cache", "key_pattern")

    def of(matcher: str) -> str:
        return promql.by("sum", keys, promql.total(catalog.CACHE_REQUESTS, _CACHES, matcher))

    ratio = promql.ratio(of(HITS), of(LOOKUPS))
    misses = promql.by("sum", ("key_pattern",), promql.flow(catalog.CACHE_REQUESTS, _CACHES, _MISS))
    return Row(
        "Which keys?",
        (
            Cell(
                panels.listing(
                    "Key patterns in the time shown",
                    (
                        "Which keys are asked for most, and which miss? A busy pattern with a low ratio is the first "
                        "to tune."
                    ),
                    {"cache": "Cache", "key_pattern": "Key pattern"},
                    Column("Look-ups", of(LOOKUPS), "short", 0, bar=True),
                    Column(
                        "Hit ratio",
                        ratio,
                        "percentunit",
                        1,
                        ((None, palette.BAD), (0.5, palette.WARN), (0.8, palette.GOOD)),
                    ),
                    Column("Misses", f"{of(_MISS)} or 0 * {of(LOOKUPS)}", "short", 0),
                    sort="Look-ups",
                    widths={"Cache": 110, "Hit ratio": 90, "Misses": 90},
                ),
                12,
                9,
            ),
            Cell(
                panels.lines(
                    "Misses by key pattern",
                    "Which keys fall through to the database right now? One that leaps up has expired or been renamed.",
                    "ops",
                    Query(promql.top(misses), "{{key_pattern}}"),
                    legend="wide",
                    stacked=True,
                ),
                12,
                9,
            ),
        ),
    )


def _details_row() -> Row:
    operation = ("cache", "operation")
    calls = promql.by("sum", operation, promql.flow(catalog.CACHE_OPERATION_DURATION, _CACHES, suffix="_count"))
    waits = promql.by("sum", ("http_route",), promql.flow(catalog.REQUEST_STAGE, 'stage="cache"'))
    return Row(
        "Details",
        across(
            8,
            panels.lines(
                "Latency by operation, p95",
                (
                    "Which operation is slow? One slow operation is a large value or a slow command; all of them are "
                    "the network or the server."
                ),
                "s",
                Query(
                    promql.shown_quantile(0.95, catalog.CACHE_OPERATION_DURATION, operation, _CACHES),
                    "{{operation}} {{cache}}",
                ),
                legend="table",
            ),
            panels.lines(
                "Operations by kind",
                "What is the cache asked to do? More writes than reads mean that entries expire before they are used.",
                "ops",
                Query(calls, "{{operation}} {{cache}}"),
                legend="table",
                stacked=True,
            ),
            panels.lines(
                "Time in the cache by route",
                "Which routes wait for the cache? The value is how many of their requests wait on average.",
                "short",
                Query(promql.top(waits), "{{http_route}}"),
                legend="table",
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Cache",
        "Does the cache still take the load off the database, and which keys miss?",
        (_first_row(), _ratio_row(), _keys_row(), _details_row()),
        (Variable("cache", catalog.CACHE_REQUESTS, "cache", "Cache"),),
    )
