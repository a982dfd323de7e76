"""The rows of the pool board that say whether the pool is full."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import palette, panels, promql
from fastapi_headroom.pack.board import Cell, Row, across
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.pool_queries import NAME, PER_POOL, POOLS, STATE, summed


def _used_share() -> str:
    used = promql.by("sum", PER_POOL, promql.shown(catalog.POOL_COUNT, POOLS, f'{STATE}="used"'))
    return f"{used} / {promql.by('sum', PER_POOL, promql.shown(catalog.POOL_MAX, POOLS))}"


def first_row() -> Row:
    share: panels.Steps = ((None, palette.GOOD), (0.8, palette.WARN), (0.95, palette.BAD))
    wait: panels.Steps = (
        (None, palette.GOOD),
        (thresholds.POOL_WAIT_P95 / 2, palette.WARN),
        (thresholds.POOL_WAIT_P95, palette.BAD),
    )
    rate_of = promql.by("sum", (), promql.flow(catalog.POOL_TIMEOUTS, POOLS))
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Used of the limit",
                "How much of the fullest pool's limit is in use? At 100 % checkouts wait.",
                "percentunit",
                f"max({_used_share()})",
                steps=share,
                decimals=0,
            ),
            panels.number(
                "Waiting now",
                (
                    "How many checkouts wait for a connection right now? Anything but short spikes means that "
                    "requests queue for the database."
                ),
                "short",
                summed(catalog.POOL_PENDING),
                steps=((None, palette.GOOD), (1, palette.WARN), (10, palette.BAD)),
                decimals=0,
            ),
            panels.number(
                "Wait, p95",
                (
                    f"How long does one checkout in twenty wait at least? Over {thresholds.POOL_WAIT_P95 * 1000:.0f} "
                    "ms an alert fires."
                ),
                "s",
                promql.shown_quantile(0.95, catalog.POOL_WAIT, (), POOLS),
                steps=wait,
            ),
            panels.number(
                "Time-outs",
                "How many checkouts per second give up? Each is a failed request.",
                "ops",
                rate_of,
                steps=panels.ZERO_IS_GOOD,
            ),
            panels.number(
                "Held, p99",
                (
                    "How long does a request keep its connection in the slowest one of a hundred? Long holds are "
                    "what fills a pool."
                ),
                "s",
                promql.shown_quantile(0.99, catalog.POOL_USE, (), POOLS),
                steps=((None, palette.GOOD), (5, palette.WARN), (30, palette.BAD)),
            ),
            panels.number(
                "Open connections",
                (
                    "How many connections do all workers have open together? The database's max_connections must "
                    "hold them and everybody else's."
                ),
                "short",
                promql.by("sum", (), promql.shown(catalog.POOL_COUNT, POOLS)),
                decimals=0,
            ),
        ),
    )


def limits_row() -> Row:
    return Row(
        "Is the pool full, and who pays for it?",
        (
            Cell(
                panels.lines(
                    "Connections against the limit",
                    (
                        "How near is the pool to its limit? Used that touches the dashed line means that checkouts "
                        "wait; overflow above the size means that connections are opened and thrown away."
                    ),
                    "short",
                    Query(summed(catalog.POOL_COUNT, f'{STATE}="used"'), "used"),
                    Query(summed(catalog.POOL_COUNT, f'{STATE}="idle"'), "idle"),
                    Query(summed(catalog.POOL_MAX), "limit"),
                    Query(summed(catalog.POOL_IDLE_MAX), "size"),
                    Query(summed(catalog.POOL_OVERFLOW), "overflow"),
                    colours={
                        "used": palette.NEUTRAL,
                        "idle": palette.QUIET,
                        "overflow": palette.WARN,
                        "size": "yellow",
                    },
                    stacked=True,
                    limits=("limit", "size", "overflow"),
                    decimals=0,
                ),
                12,
                9,
            ),
            Cell(
                panels.lines(
                    "Wait for a connection",
                    (
                        "How long do checkouts wait? A rising p50 means that everybody waits, a rising p99 alone "
                        "that bursts do."
                    ),
                    "s",
                    *(
                        Query(
                            promql.shown_quantile(q, catalog.POOL_WAIT, (), POOLS),
                            f"p{q * 100:.0f}",
                            exemplar=q == 0.99,
                        )
                        for q in (0.5, 0.95, 0.99)
                    ),
                    Query(f"vector({promql.number(thresholds.POOL_WAIT_P95)})", "p95 limit"),
                    colours=palette.QUANTILES,
                    limits=("p95 limit",),
                ),
                6,
                9,
            ),
            Cell(
                panels.lines(
                    "Waiting and timing out",
                    "Does the queue for connections drain, or do requests give up? Time-outs mean lost requests.",
                    "short",
                    Query(promql.by("sum", PER_POOL, promql.shown(catalog.POOL_PENDING, POOLS)), f"waiting {NAME}"),
                    Query(promql.by("sum", PER_POOL, promql.flow(catalog.POOL_TIMEOUTS, POOLS)), f"time-outs/s {NAME}"),
                ),
                6,
                9,
            ),
        ),
    )
