"""The row of the pool board that says what size a pool should have, and whether the database can take it."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import panels, promql
from fastapi_headroom.pack.board import Cell, Row
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.pool_queries import may_open

(_POOL,) = catalog.POOL_MAX.labels
_POOLS = f'{_POOL}=~"$pool"'
_PER_POOL = (_POOL,)
_NAME = f"{{{{{_POOL}}}}}"


def _per_worker(metric: catalog.Metric) -> str:
    return promql.by("max", _PER_POOL, promql.shown(metric, _POOLS))


def _shown(metric: catalog.Metric) -> str:
    return promql.shown(metric, _POOLS)


def _over_all(metric: catalog.Metric) -> str:
    """Return a size of one worker's pool times the workers of each instance that have it."""
    labels = ("job", "instance", _POOL)
    times = f"{promql.shown(metric, _POOLS)} * on ({', '.join(labels)}) {promql.shown(catalog.POOL_WORKERS, _POOLS)}"
    return promql.by("sum", _PER_POOL, times)


def _configured() -> str:
    limit, workers = promql.shown(catalog.POOL_MAX, _POOLS), promql.shown(catalog.POOL_WORKERS, _POOLS)
    return f"{limit} / on (job, instance, {_POOL}) {workers}"


def _spare() -> str:
    """Return the connections that nobody needed for a day, by pool, over all workers of an instance."""
    peak = f"max_over_time({promql.shown(catalog.POOL_PEAK, _POOLS)}[1d])"
    spare = f"({_configured()} - on (job, instance, {_POOL}) {peak})"
    workers = promql.shown(catalog.POOL_WORKERS, _POOLS)
    return f"clamp_min({spare}, 0) * on (job, instance, {_POOL}) {workers}"


def _never_needed() -> str:
    return promql.by("sum", (), _spare())


def spare_memory() -> str:
    """Return the bytes that the database server would take for the connections that nobody needed for a day."""
    each = promql.shown(catalog.CONNECTION_BYTES, _POOLS)
    return promql.by("sum", (), f"{_spare()} * on (job, instance, {_POOL}) {each}")


def row() -> Row:
    """Return the row of panels."""
    target = thresholds.POOL_TARGET_WAIT_P95
    return Row(
        "What size should it be?",
        (
            Cell(
                panels.lines(
                    "Size of one worker's pool",
                    (
                        "Is the pool of a worker (size and overflow) as large as its checkouts ask for? A size below "
                        f"the recommended one means that more than one checkout in twenty waits over "
                        f"{target * 1000:.0f} ms; far above the peak means connections for nothing."
                    ),
                    "short",
                    Query(promql.by("max", _PER_POOL, _configured()), f"actual {_NAME}"),
                    Query(_per_worker(catalog.POOL_RECOMMENDED), f"recommended {_NAME}"),
                    Query(_per_worker(catalog.POOL_PEAK), f"needed at peak {_NAME}"),
                    decimals=0,
                ),
                7,
                8,
            ),
            Cell(
                panels.lines(
                    "All workers against the database",
                    (
                        "Does the database let in what all workers of all instances may open? Above the dashed line "
                        "connects are refused at full load. Under autosize a pool may grow to its maximum, within its "
                        "host's budget. Other apps on the same server need their share as well."
                    ),
                    "short",
                    Query(promql.by("sum", _PER_POOL, promql.shown(catalog.POOL_MAX, _POOLS)), f"actual {_NAME}"),
                    Query(promql.by("sum", _PER_POOL, may_open(_shown)), f"may open {_NAME}"),
                    Query(_over_all(catalog.POOL_RECOMMENDED), f"recommended {_NAME}"),
                    Query(promql.by("max", (), promql.shown(catalog.DATABASE_CONNECTIONS_MAX, _POOLS)), "budget"),
                    limits=("budget",),
                    decimals=0,
                ),
                7,
                8,
            ),
            Cell(
                panels.lines(
                    "Predicted wait, p95 by size",
                    (
                        "What would another size cost or bring? Each line is the predicted wait at a multiple of the "
                        "recommended size; a line that is missing would wait without bound."
                    ),
                    "s",
                    Query(
                        promql.by("max", (_POOL, "size"), promql.shown(catalog.POOL_PREDICTED_WAIT, _POOLS)),
                        f"{{{{size}}}} {_NAME}",
                    ),
                    Query(f"vector({promql.number(target)})", "target"),
                    limits=("target",),
                ),
                7,
                8,
            ),
            Cell(
                panels.number(
                    "Never needed for a day",
                    (
                        "How many connections, over all workers, did nobody need within the last day? Each takes "
                        "from the database's budget and memory. Let a day with the usual peak pass before you take "
                        "them away."
                    ),
                    "short",
                    _never_needed(),
                    decimals=0,
                    empty="not known",
                ),
                3,
                8,
            ),
        ),
    )
