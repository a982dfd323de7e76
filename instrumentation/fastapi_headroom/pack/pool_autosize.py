"""The row of the pool board that shows how autosize moves the limit, and what holds it back."""

from __future__ import annotations

from fastapi_headroom import catalog
from fastapi_headroom.pack import panels, promql
from fastapi_headroom.pack.board import Cell, Row
from fastapi_headroom.pack.panels import Query

(_POOL,) = catalog.POOL_MAX.labels
_POOLS = f'{_POOL}=~"$pool"'
_NAME = f"{{{{{_POOL}}}}}"
_NO_SERIES = "Without `headroom.autosize` there is nothing here."


def _summed(metric: catalog.Metric) -> str:
    return promql.by("sum", (_POOL,), promql.shown(metric, _POOLS))


def row() -> Row:
    """Return the row of panels."""
    autosized = promql.shown(catalog.POOL_AUTOSIZE_BUDGET, _POOLS)
    limit = f"{promql.shown(catalog.POOL_MAX, _POOLS)} and on (job, instance, {_POOL}) {autosized}"
    return Row(
        "Does the limit follow the load?",
        (
            Cell(
                panels.lines(
                    "Limit within autosize's range",
                    (
                        "Where between minimum and budget is the limit of all workers together, and is it where the "
                        "checkouts want it? Wanted that stays above the limit means that something holds it back: see "
                        f"the panel to the right. {_NO_SERIES}"
                    ),
                    "short",
                    Query(promql.by("sum", (_POOL,), limit), f"limit {_NAME}"),
                    Query(_summed(catalog.POOL_AUTOSIZE_WANTED), f"wanted {_NAME}"),
                    Query(_summed(catalog.POOL_AUTOSIZE_MINIMUM), "minimum"),
                    Query(promql.by("max", (_POOL,), autosized), "budget"),
                    limits=("minimum", "budget"),
                    decimals=0,
                ),
                10,
                8,
            ),
            Cell(
                panels.lines(
                    "Changes of the limit",
                    (
                        "Does the limit settle, or does it go up and down all the time? Steady changes both ways cost "
                        f"connects: raise `patience` or the minimum. {_NO_SERIES}"
                    ),
                    "cpm",
                    Query(
                        f"60 * {promql.by('sum', ('direction', 'reason'), _flow(catalog.POOL_AUTOSIZE_CHANGES))}",
                        "{{direction}}: {{reason}}",
                    ),
                ),
                7,
                8,
            ),
            Cell(
                panels.lines(
                    "Held back, by reason",
                    (
                        "What keeps the limit below what is wanted: its maximum, the budget (other workers have the "
                        "rest), the CPU of the process, or the database, which serves no more with more connections? "
                        f"The value is how many workers are held back on average. {_NO_SERIES}"
                    ),
                    "short",
                    Query(promql.by("sum", ("reason",), _flow(catalog.POOL_AUTOSIZE_HELD_BACK)), "{{reason}}"),
                ),
                7,
                8,
            ),
        ),
    )


def _flow(metric: catalog.Metric) -> str:
    return promql.flow(metric, _POOLS)
