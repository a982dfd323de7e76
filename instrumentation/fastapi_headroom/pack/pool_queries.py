"""The words that the rules and rows of the pool share."""

from __future__ import annotations

from collections.abc import Callable

from fastapi_headroom import catalog
from fastapi_headroom.pack import promql

UID = "headroom-pool"
POOL = "db_client_connection_pool_name"
STATE = "db_client_connection_state"
PER_POOL = (POOL,)
POOLS = f'{POOL}=~"$pool"'
"""The pools that were chosen on the board."""
NAME = f"{{{{{POOL}}}}}"
"""The pool's name in a legend."""


def summed(metric: catalog.Metric, *matchers: str) -> str:
    """Return a gauge summed over all that was chosen."""
    return promql.by("sum", (), promql.shown(metric, POOLS, *matchers))


def by_route(metric: catalog.Metric) -> str:
    """Return the routes with the highest rates of a counter."""
    return promql.top(promql.by("sum", ("http_route",), promql.flow(metric, POOLS)))


def may_open(gauge: Callable[[catalog.Metric], str]) -> str:
    """Return what each pool of an instance may open at worst, over all its workers; ``gauge`` gives a gauge's series.

    That is the limit, and under autosize, which keeps the limit small while little is asked for, how far it may grow:
    to the maximum of all workers, but no further than the budget that they share.
    """
    labels = ("job", "instance", POOL)
    limit = promql.by("sum", labels, gauge(catalog.POOL_MAX))
    maximum = promql.by("sum", labels, gauge(catalog.POOL_AUTOSIZE_MAXIMUM))
    budget = promql.by("max", labels, gauge(catalog.POOL_AUTOSIZE_BUDGET))
    reach = promql.block(f"{maximum} < {budget}\nor {budget}")
    return promql.block(f"{reach} > {limit}\nor {limit}")
