"""The rows of the pool board that say which routes, and which habits of the code, fill the pool."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import panels, promql
from fastapi_headroom.pack.board import Row, across
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.pool_queries import POOLS, by_route


def routes_row() -> Row:
    return Row(
        "Who waits, who holds",
        across(
            11,
            panels.lines(
                "Victims: requests waiting, by route",
                "Which routes wait for connections? The value is how many of their requests wait on average.",
                "short",
                Query(by_route(catalog.POOL_WAIT_BY_ROUTE), "{{http_route}}"),
                legend="table",
            ),
            panels.lines(
                "Culprits: connections held, by route",
                (
                    "Which routes keep the pool busy? The value is how many connections each holds on average: "
                    "shorten the highest first."
                ),
                "short",
                Query(by_route(catalog.POOL_HOLD_BY_ROUTE), "{{http_route}}"),
                legend="table",
            ),
            panels.lines(
                "Held but idle, by route",
                (
                    "Which routes hold a connection while no statement runs on it, say during a call to another "
                    "service? That is capacity for nothing."
                ),
                "short",
                Query(by_route(catalog.POOL_IDLE_HOLD_BY_ROUTE), "{{http_route}}"),
                legend="table",
            ),
        ),
    )


def habits_row() -> Row:
    return Row(
        "Which code is it? The log names the line",
        across(
            8,
            panels.lines(
                "Held for long, by route",
                (
                    "Which routes keep a connection beyond the threshold, or never give it back? The log has a record "
                    "of each place: where it was checked out, and where its holder stands."
                ),
                "ops",
                Query(by_route(catalog.POOL_LONG_HOLDS), "{{http_route}}"),
                legend="table",
            ),
            panels.lines(
                "Leaked connections, by route",
                (
                    "Which routes have left connections open that nobody is left to close? Each is lost to the pool "
                    "until the worker restarts, or the garbage collector finds its session."
                ),
                "short",
                Query(
                    promql.or_zero(
                        promql.by("sum", ("http_route",), promql.shown(catalog.POOL_LEAKED, POOLS)), "http_route"
                    ),
                    "{{http_route}}",
                ),
                legend="table",
                decimals=0,
            ),
            panels.lines(
                "Repeated statements (N+1), by route",
                (
                    f"In which routes does one request run one statement {thresholds.REPEATED_STATEMENTS} times or "
                    "more? The log has the statement's shape and the line that runs it."
                ),
                "ops",
                Query(
                    promql.top(promql.by("sum", ("http_route",), promql.flow(catalog.REPEATED_STATEMENTS))),
                    "{{http_route}}",
                ),
                legend="table",
            ),
        ),
    )
