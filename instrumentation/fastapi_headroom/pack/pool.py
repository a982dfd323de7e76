"""Database pool: who waits for connections, who holds them, and how far the limit is."""

from __future__ import annotations

from fastapi_headroom import catalog
from fastapi_headroom.pack import board, pool_autosize, pool_details, pool_limits, pool_routes, pool_size
from fastapi_headroom.pack.board import Variable
from fastapi_headroom.pack.pool_queries import POOL, STATE, UID
from fastapi_headroom.pack.pool_rules import RULES

__all__ = ["POOL", "RULES", "STATE", "UID", "render"]


def render() -> str:
    """Return the board as JSON."""
    rows = (
        pool_limits.first_row(),
        pool_limits.limits_row(),
        pool_size.row(),
        pool_autosize.row(),
        pool_routes.routes_row(),
        pool_routes.habits_row(),
        pool_details.details_row(),
    )
    return board.build(
        UID,
        "Headroom / Database pool",
        "Do requests wait for database connections, who holds them, and is it the pool or the database?",
        rows,
        (Variable("pool", catalog.POOL_MAX, POOL, "Pool"),),
    )
