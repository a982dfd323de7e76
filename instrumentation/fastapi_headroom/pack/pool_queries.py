"""The words that the rules and rows of the pool share."""

from __future__ import annotations

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
