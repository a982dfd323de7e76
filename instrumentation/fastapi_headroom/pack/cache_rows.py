"""The rows of the cache board that hold for a cache of any kind."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import palette, panels, promql
from fastapi_headroom.pack.board import Cell, Row, across
from fastapi_headroom.pack.cache_queries import CACHES, HITS, LOOKUPS, MISS, hit_ratio, lookups, served, served_ratio
from fastapi_headroom.pack.panels import Column, Query

RATIO_STEPS = ((None, palette.BAD), (0.5, palette.WARN), (0.8, palette.GOOD))


def first() -> Row:
    """Is it bad?"""
    errors = promql.by("sum", (), promql.flow(catalog.CACHE_REQUESTS, CACHES, 'result="error"'))
    seconds = promql.by("sum", (), promql.flow(catalog.REQUEST_STAGE, 'stage="cache"'))
    every = promql.by("sum", (), promql.flow(catalog.REQUESTS))
    misses = promql.by("sum", (), promql.flow(catalog.CACHE_REQUESTS, CACHES, MISS))
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Hit ratio",
                (
                    "What share of look-ups do the cache servers answer? What they do not answer falls on the "
                    "database. Caches in the process count where there is no server."
                ),
                "percentunit",
                served_ratio((), CACHES),
                steps=RATIO_STEPS,
                decimals=1,
            ),
            panels.number(
                "Look-ups",
                "How many look-ups per second do the cache servers get? A hit ratio on few look-ups says little.",
                "ops",
                f"{served((), CACHES, LOOKUPS)}\nor {lookups(promql.INTERVAL, *promql.BOARD, CACHES, labels=())}",
            ),
            panels.number(
                "Misses",
                "How many look-ups per second fall through to the database?",
                "ops",
                promql.or_zero(f"{served((), CACHES, MISS)}\nor {misses}"),
            ),
            panels.number(
                "Latency, p99",
                "How long does the slowest operation of a hundred take? A cache slower than the database is none.",
                "s",
                promql.shown_quantile(0.99, catalog.CACHE_OPERATION_DURATION, (), CACHES),
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


def ratio() -> Row:
    """Does the cache take the load?"""
    caches = ("cache",)
    per_cache = hit_ratio(promql.INTERVAL, *promql.BOARD, CACHES, labels=caches)
    asked = lookups(promql.INTERVAL, *promql.BOARD, CACHES, labels=caches)
    results = promql.by("sum", ("result",), promql.flow(catalog.CACHE_REQUESTS, CACHES))
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
                "Look-ups by cache",
                "How much is each cache asked? A ratio that falls on few look-ups costs nobody anything.",
                "ops",
                Query(promql.top(asked), "{{cache}}"),
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


def stale() -> Row:
    """Are answers out of date?"""
    out_of_date = promql.by("sum", ("cache",), promql.flow(catalog.CACHE_REQUESTS, CACHES, 'result="stale"'))
    asked = lookups(promql.INTERVAL, *promql.BOARD, CACHES, labels=("cache",))
    thrown = promql.by("sum", ("cache", "key_pattern"), promql.flow(catalog.CACHE_INVALIDATIONS, CACHES))

    def age(q: float) -> str:
        return promql.shown_quantile(q, catalog.CACHE_ENTRY_AGE, ("cache",), CACHES)

    return Row(
        "Are answers out of date?",
        across(
            8,
            panels.lines(
                "Age when served",
                (
                    "How old are the entries that people get? Near the time to live, nothing but it ends an entry. "
                    "Known of entries that the worker wrote itself, or that the app tells."
                ),
                "s",
                Query(age(0.5), "p50 {{cache}}"),
                Query(age(0.95), "p95 {{cache}}"),
            ),
            panels.lines(
                "Served out of date",
                (
                    "What share of answers does the app itself know to be out of date, by cache or region? A rise "
                    "means that events or renewals do not get through."
                ),
                "percentunit",
                Query(promql.or_zero(f"{out_of_date} / {asked}", "cache"), "{{cache}}"),
                Query(f"vector({promql.number(thresholds.CACHE_STALE_SHARE)})", "limit"),
                limits=("limit",),
            ),
            panels.lines(
                "Invalidated by events",
                "How many entries do events throw away? At 0 while data change, the events are lost.",
                "ops",
                Query(promql.top(thrown), "{{key_pattern}} {{cache}}"),
            ),
        ),
    )


def trouble() -> Row:
    """Stampedes and errors."""
    patterns = ("cache", "key_pattern")
    duplicates = promql.by("sum", patterns, promql.flow(catalog.CACHE_DUPLICATE_FILLS, CACHES))
    at_once = promql.by("sum", ("cache",), promql.shown(catalog.CACHE_CONCURRENT_FILLS, CACHES))
    errors = promql.by("sum", ("cache",), promql.flow(catalog.CACHE_REQUESTS, CACHES, 'result="error"'))
    late = promql.by("sum", ("cache",), promql.flow(catalog.CACHE_TIMEOUTS, CACHES))
    return Row(
        "Stampedes and errors",
        across(
            8,
            panels.lines(
                "Keys that are filled twice",
                (
                    "How many misses per second come while another request is filling the same key? Each of them works "
                    "out anew what is being worked out: a stampede."
                ),
                "ops",
                Query(promql.top(duplicates), "{{key_pattern}} {{cache}}"),
            ),
            panels.lines(
                "Fills that double others",
                "How many requests are at such double work now? A line that climbs is a stampede that feeds itself.",
                "short",
                Query(at_once, "{{cache}}"),
            ),
            panels.lines(
                "Failed look-ups",
                "Do look-ups fail, and is it because nobody answers in time?",
                "ops",
                Query(promql.or_zero(errors, "cache"), "errors {{cache}}"),
                Query(late, "time-outs {{cache}}"),
            ),
        ),
    )


def keys() -> Row:
    """Which keys?"""
    patterns = ("cache", "key_pattern")
    named = 'key_pattern!=""'

    def of(matcher: str) -> str:
        return promql.by("sum", patterns, promql.total(catalog.CACHE_REQUESTS, CACHES, named, matcher))

    asked = f"({of(LOOKUPS)} > 0)"
    misses = promql.by("sum", ("key_pattern",), promql.flow(catalog.CACHE_REQUESTS, CACHES, named, MISS))
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
                    Column("Look-ups", asked, "short", 0, bar=True),
                    Column("Hit ratio", promql.ratio(of(HITS), asked), "percentunit", 1, RATIO_STEPS),
                    Column("Misses", f"({of(MISS)} or 0 * {asked}) and {asked}", "short", 0),
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


def details() -> Row:
    """Details."""
    operation = ("cache", "operation")
    calls = promql.by("sum", operation, promql.flow(catalog.CACHE_OPERATION_DURATION, CACHES, suffix="_count"))
    waits = promql.by("sum", ("http_route",), promql.flow(catalog.REQUEST_STAGE, 'stage="cache"'))
    payload = promql.shown_quantile(0.95, catalog.CACHE_PAYLOAD, ("cache", "direction"), CACHES)
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
                    promql.shown_quantile(0.95, catalog.CACHE_OPERATION_DURATION, operation, CACHES),
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
                "Payload, p95",
                "How large are values? Large ones cost the server's only thread, the network, and the event loop.",
                "bytes",
                Query(payload, "{{direction}} {{cache}}"),
                legend="table",
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
