"""The rows of the cache board that tell levels apart: clients, the process, servers, and what is left for the rest."""

from __future__ import annotations

from typing import Any

from fastapi_headroom import catalog
from fastapi_headroom.pack import panels, promql
from fastapi_headroom.pack.board import Cell, Row
from fastapi_headroom.pack.cache_queries import CACHES, HITS, LOOKUPS, MISS, local, served
from fastapi_headroom.pack.cache_rows import RATIO_STEPS
from fastapi_headroom.pack.panels import Column, Query

_ANSWERED = 'http_response_status_code=~"200|304"'
_NOT_MODIFIED = 'http_response_status_code="304"'
_KEEPABLE = 'http_response_status_code=~"[23].."'
_READS = 'http_request_method=~"GET|HEAD"'
_BY = ("cache",)


def _http(*matchers: str) -> str:
    return promql.by("sum", ("http_route",), promql.flow(catalog.REQUEST_DURATION, *matchers, suffix="_count"))


def _cacheable(status: str) -> str:
    """Return requests per second by route of those routes that ever answered 304 in the time shown."""
    ever = promql.by("sum", ("http_route",), promql.total(catalog.REQUEST_DURATION, _NOT_MODIFIED, suffix="_count"))
    return f"({_http(status)} and on (http_route) {ever} > 0)"


def _kept() -> Cell:
    answered = f"({_http(_KEEPABLE, _READS)} > 0)"

    def saying(matcher: str) -> str:
        return promql.by("sum", ("http_route",), promql.flow(catalog.RESPONSE_CACHE_POLICIES, matcher))

    used, asked, never = (
        saying(f'policy=~"{policies}"') for policies in ("public|private", "revalidate|no_lifetime", "no_store")
    )
    lifetime = promql.by("sum", ("http_route",), promql.flow(catalog.RESPONSE_MAX_AGE))
    return Cell(
        panels.listing(
            "HTTP: what clients and proxies may keep",
            (
                "Which busy route could be answered before it reaches us? A route with 0 % in all three says nothing "
                "in Cache-Control: clients ask again each time, or guess. A fall of what is used unasked after a "
                "deploy is traffic that clients had spared us; a long lifetime is how long they show what has changed."
            ),
            {"http_route": "Route"},
            Column("Answers/s", answered, "reqps", 2, bar=True),
            Column("Used unasked", promql.ratio(used, answered), "percentunit", 1),
            Column("Ask each time", promql.ratio(asked, answered), "percentunit", 1),
            Column("Never kept", promql.ratio(never, answered), "percentunit", 1),
            Column("Mean lifetime", f"{lifetime} / ({used} > 0)", "s", 0),
            sort="Answers/s",
            widths={"Used unasked": 130, "Ask each time": 130, "Never kept": 130, "Mean lifetime": 130},
        ),
        24,
        8,
    )


def levels() -> Row:
    """What does each level keep from the next?"""
    not_modified, answered = f"sum({_cacheable(_NOT_MODIFIED)})", f"sum({_cacheable(_ANSWERED)})"
    statements = promql.by("sum", (), promql.flow(catalog.DB_OPERATION_DURATION, suffix="_count"))
    return Row(
        "What does each level keep from the next?",
        (
            Cell(
                panels.lines(
                    "Hit ratio by level",
                    (
                        "Which level does the work, from the outermost to the innermost? HTTP: answers 304 on the "
                        "routes that give any. A level that stands at 0 costs its upkeep and spares nothing."
                    ),
                    "percentunit",
                    Query(f"{not_modified} / {answered}", "HTTP: not modified"),
                    Query(promql.ratio(local((), CACHES, HITS), local((), CACHES, LOOKUPS)), "in the process"),
                    Query(promql.ratio(served((), CACHES, HITS), served((), CACHES, LOOKUPS)), "cache servers"),
                    maximum=1,
                ),
                8,
                9,
            ),
            Cell(
                panels.lines(
                    "What passes each level",
                    (
                        "How much per second is left for the level below, and for the database in the end? Where one "
                        "line rises alone, the level above it has stopped to help."
                    ),
                    "ops",
                    Query(f"{answered} - {not_modified}", "past HTTP"),
                    Query(local((), CACHES, MISS), "past the process"),
                    Query(served((), CACHES, MISS), "past cache servers"),
                    Query(statements, "statements of the database"),
                ),
                8,
                9,
            ),
            Cell(
                panels.listing(
                    "HTTP: routes that clients may cache",
                    (
                        "How often is a client told that what it has is still good? A busy route with a low share has "
                        "an ETag that changes too often, or clients that do not ask."
                    ),
                    {"http_route": "Route"},
                    Column("Answers/s", _cacheable(_ANSWERED), "reqps", 2, bar=True),
                    Column(
                        "304", f"{_cacheable(_NOT_MODIFIED)} / {_cacheable(_ANSWERED)}", "percentunit", 1, RATIO_STEPS
                    ),
                    sort="Answers/s",
                    widths={"304": 80},
                ),
                8,
                9,
            ),
            _kept(),
        ),
    )


def _in_threes(height: int, *cells: Any) -> tuple[Cell, ...]:
    return tuple(Cell(panel, 8, height) for panel in cells)


def servers() -> Row:
    """Cache servers, as they tell themselves; every instance's sidecar may say the same, so the highest counts."""

    def highest(metric: catalog.Metric) -> str:
        return promql.by("max", _BY, promql.shown(metric, CACHES))

    def fastest(metric: catalog.Metric, *matchers: str) -> str:
        return promql.by("max", _BY, promql.flow(metric, CACHES, *matchers))

    own = f"and on (cache) {promql.shown(catalog.CACHE_SERVER_INFO, CACHES)}"
    hits, misses = (fastest(catalog.CACHE_SERVER_LOOKUPS, f'result="{result}"') for result in ("hit", "miss"))
    return Row(
        "Cache servers",
        _in_threes(
            7,
            panels.lines(
                "Memory, of the limit",
                (
                    "Is the server full? At 100 % it evicts, or refuses writes where its policy is noeviction. "
                    "A server without a limit is not here."
                ),
                "percentunit",
                Query(f"{highest(catalog.CACHE_MEMORY)} / {highest(catalog.CACHE_MEMORY_LIMIT)}", "{{cache}}"),
                maximum=1,
            ),
            panels.lines(
                "Memory",
                "How much does the server hold? Growth that outruns the entries is large values, or fragmentation.",
                "bytes",
                Query(highest(catalog.CACHE_MEMORY), "{{cache}}"),
            ),
            panels.lines(
                "Entries of the server",
                "How many keys does the server hold, in all databases? A cliff is a flush or a restart.",
                "short",
                Query(f"{highest(catalog.CACHE_ENTRIES)} {own}", "{{cache}}"),
                decimals=0,
            ),
            panels.lines(
                "Evicted and expired",
                (
                    "Do entries go because their time is over, or because there is no room? Evictions of what is still "
                    "asked for are misses in disguise."
                ),
                "ops",
                Query(f"{fastest(catalog.CACHE_EVICTIONS)} {own}", "evicted {{cache}}"),
                Query(fastest(catalog.CACHE_EXPIRATIONS), "expired {{cache}}"),
            ),
            panels.lines(
                "Hit ratio of the server",
                (
                    "What does the server answer to all its clients and databases? Unlike the app's own ratio, "
                    "somebody else asks the same server."
                ),
                "percentunit",
                Query(f"{hits} / ({hits} + {misses})", "{{cache}}"),
                maximum=1,
            ),
            panels.lines(
                "Connections to the server",
                "Will it accept the next one? Connections that only grow are leaked by a client.",
                "short",
                Query(highest(catalog.CACHE_CLIENTS), "{{cache}}"),
                decimals=0,
            ),
        ),
    )


def contents() -> Row:
    """What cache servers hold, where the exporter looks at keys."""
    return Row("What cache servers hold", (_sampled(),))


def _sampled() -> Cell:
    by = ("cache", "key_pattern")

    def seen(metric: catalog.Metric, *matchers: str, labels: tuple[str, ...] = by) -> str:
        return promql.by("sum", labels, promql.total(metric, CACHES, *matchers))

    keys = f"({seen(catalog.CACHE_SAMPLED_KEYS)} > 0)"
    size = seen(catalog.CACHE_SAMPLED_BYTES)
    whole = seen(catalog.CACHE_SAMPLED_BYTES, labels=_BY)
    never, soon = (seen(catalog.CACHE_SAMPLED_KEYS, f'expires="{it}"') for it in ("never", "within_minute"))
    return Cell(
        panels.listing(
            "What fills the server, by random keys in the time shown",
            (
                "Which entries fill the memory, and will they ever go? A pattern with much of the memory that never "
                "expires grows until the server evicts or refuses; one that ends within a minute as a whole comes "
                "back as misses all at once. Shares are estimates: of 100 keys seen, within ten points."
            ),
            {"cache": "Cache", "key_pattern": "Keys"},
            Column("Of the memory", f"{size} / on (cache) group_left () {whole}", "percentunit", 0, bar=True),
            Column("Keys seen", keys, "short", 0),
            Column("Never expire", promql.ratio(never, keys), "percentunit", 0),
            Column("End within a minute", promql.ratio(soon, keys), "percentunit", 0),
            Column("Mean idle", f"{seen(catalog.CACHE_SAMPLED_IDLE)} / {keys}", "s", 0),
            sort="Of the memory",
            widths={"Keys seen": 110, "Never expire": 130, "End within a minute": 170, "Mean idle": 110},
        ),
        24,
        8,
    )


def in_process() -> Row:
    """Caches in the process."""
    held = promql.by("sum", _BY, promql.shown(catalog.CACHE_ENTRIES, CACHES))
    limit = promql.by("sum", _BY, promql.shown(catalog.CACHE_ENTRIES_LIMIT, CACHES))

    def of(matcher: str) -> str:
        none_of_servers = (
            f"on (cache) {promql.series(catalog.CACHE_OPERATION_DURATION, *promql.BOARD, suffix='_count')}"
        )
        return (
            f"{promql.by('sum', _BY, promql.total(catalog.CACHE_REQUESTS, CACHES, matcher))} unless {none_of_servers}"
        )

    asked = f"(({of(LOOKUPS)}) > 0)"
    evicted = promql.by("sum", _BY, promql.total(catalog.CACHE_EVICTIONS, CACHES))
    return Row(
        "Caches in the process",
        (
            Cell(
                panels.listing(
                    "Caches in the process, in the time shown",
                    (
                        "Which caches of functions and dictionaries work? One that is full and misses much is too "
                        "small; one that is never asked can go. Entries are the sum over the workers."
                    ),
                    {"cache": "Cache"},
                    Column("Look-ups", asked, "short", 0, bar=True),
                    Column("Hit ratio", f"({of(HITS)}) / {asked}", "percentunit", 1, RATIO_STEPS),
                    Column("Entries", f"{held} and on (cache) {asked}", "short", 0),
                    Column("Full", f"{held} / {limit} and on (cache) {asked}", "percentunit", 0),
                    Column("Evicted", f"{evicted} and on (cache) {asked}", "short", 0),
                    sort="Look-ups",
                    widths={"Hit ratio": 90, "Entries": 90, "Full": 80, "Evicted": 90},
                ),
                24,
                8,
            ),
        ),
    )
