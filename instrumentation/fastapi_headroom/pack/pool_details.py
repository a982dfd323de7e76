"""The row of the pool board with connections, statements and rows in detail."""

from __future__ import annotations

from fastapi_headroom import catalog
from fastapi_headroom.pack import palette, panels, pool_size, promql
from fastapi_headroom.pack.board import Row, across
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.pool_queries import NAME, PER_POOL, POOLS


def details_row() -> Row:
    operation = "db_operation_name"
    return Row(
        "Details",
        (
            *across(
                8,
                panels.buckets(
                    "Wait, spread",
                    "Does everybody wait a little, or few for long? Two bands mean two kinds of requests.",
                    "s",
                    promql.by("sum", ("le",), promql.flow(catalog.POOL_WAIT, POOLS, suffix="_bucket")),
                ),
                panels.lines(
                    "Hold time",
                    (
                        "How long do requests keep a connection? By Little's law, checkouts per second times this is "
                        "the connections needed."
                    ),
                    "s",
                    *(
                        Query(promql.shown_quantile(q, catalog.POOL_USE, (), POOLS), f"p{q * 100:.0f}")
                        for q in (0.5, 0.95, 0.99)
                    ),
                    colours=palette.QUANTILES,
                ),
                panels.lines(
                    "Opened and thrown away",
                    (
                        "Are connections opened all the time? Steady churn costs each such request the connect time: "
                        "raise the pool's size rather than its overflow. Failed pre-pings mean that the server, or "
                        "something on the way to it, closes connections: recycle them earlier (pool_recycle)."
                    ),
                    "ops",
                    Query(
                        promql.by("sum", PER_POOL, promql.flow(catalog.POOL_CREATE, POOLS, suffix="_count")),
                        f"opened {NAME}",
                    ),
                    Query(
                        promql.by("sum", PER_POOL, promql.flow(catalog.POOL_INVALIDATIONS, POOLS)),
                        f"invalidated {NAME}",
                    ),
                    Query(
                        promql.by("sum", PER_POOL, promql.flow(catalog.POOL_PING_FAILURES, POOLS)),
                        f"of these by pre-ping {NAME}",
                    ),
                    Query(
                        promql.by("sum", (*PER_POOL, "reason"), promql.flow(catalog.POOL_RECYCLES, POOLS)),
                        f"recycled ({{{{reason}}}}) {NAME}",
                    ),
                ),
            ),
            *across(
                8,
                panels.lines(
                    "Statements, p95 by operation",
                    (
                        "Is the database itself slow? If this rises while waits are flat, look at the database, not "
                        "at the pool."
                    ),
                    "s",
                    Query(
                        promql.shown_quantile(0.95, catalog.DB_OPERATION_DURATION, (operation,)), f"{{{{{operation}}}}}"
                    ),
                ),
                panels.lines(
                    "Statements per second",
                    "What load does the app put on the database?",
                    "ops",
                    Query(
                        promql.by("sum", (operation,), promql.flow(catalog.DB_OPERATION_DURATION, suffix="_count")),
                        f"{{{{{operation}}}}}",
                    ),
                    stacked=True,
                ),
                panels.lines(
                    "Statements per request, by route",
                    "Does a route run one query per row (N+1)? Means over ten deserve a look.",
                    "short",
                    Query(promql.top(promql.mean(catalog.REQUEST_QUERIES, ("http_route",))), "{{http_route}}"),
                    legend="table",
                    decimals=1,
                ),
            ),
            *across(
                8,
                panels.lines(
                    "Rows per request, by route",
                    (
                        "Does a route read far more rows than it sends? Means over a thousand deserve a look: page, or "
                        "let the database count and sum."
                    ),
                    "short",
                    Query(promql.top(promql.mean(catalog.REQUEST_ROWS, ("http_route",))), "{{http_route}}"),
                    legend="table",
                    decimals=1,
                ),
                panels.lines(
                    "Rows per second, by route",
                    "Which routes read most of what the database sends? The highest is where fewer rows help most.",
                    "ops",
                    Query(
                        promql.top(promql.by("sum", ("http_route",), promql.flow(catalog.REQUEST_ROWS, suffix="_sum"))),
                        "{{http_route}}",
                    ),
                    legend="table",
                ),
                panels.number(
                    "Memory for connections that nobody needed",
                    (
                        "How much memory may the connections take on the database server that nobody needed within the "
                        "last day, beside their share of its budget? An estimate: 2 MB each on PostgreSQL, 0.25 on "
                        "MySQL."
                    ),
                    "bytes",
                    pool_size.spare_memory(),
                    empty="not known",
                ),
            ),
        ),
    )
