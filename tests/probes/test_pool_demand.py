"""What each checkout finds in use when it asks, on real PostgreSQL: the base of the advice on pool sizes."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.store.writer import Writer

pytestmark = pytest.mark.alone

LABELS = {"db_client_connection_pool_name": "shop"}


def found(writer: Writer) -> tuple[float, float]:
    """Return how many checkouts asked, and the sum of what they found."""
    return writer.value("headroom_pool_demand_count", **LABELS), writer.value("headroom_pool_demand_sum", **LABELS)


async def test_every_checkout_counts_those_in_use_and_those_that_wait(
    postgres: Postgres, writer: Writer, pool_probe: PoolProbe
) -> None:
    """Ten at once on a pool of three find 0, 1, 2, ... 9, on new, on idle and on busy connections alike."""
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=3, max_overflow=0, pool_timeout=30, pool_logging_name="shop"
    )

    async def hold() -> None:
        async with engine.connect():
            await asyncio.sleep(0.02)

    for connection in [await engine.connect() for _ in range(3)]:  # find 0, 1, 2
        await connection.close()
    before = found(writer)
    assert before == (3, 3)
    for _ in range(5):  # one after the other: each finds nobody
        await hold()
    assert found(writer) == (8, 3)
    await asyncio.gather(*(hold() for _ in range(10)))
    assert found(writer) == (18, 3 + sum(range(10)))
    await engine.dispose()


def test_checkouts_of_a_sync_engine_count_as_well(postgres: Postgres, writer: Writer, pool_probe: PoolProbe) -> None:
    """Three nested checkouts find 0, 1 and 2; again on connections that lie ready."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=3, pool_logging_name="shop")
    for _ in range(2):
        with engine.connect(), engine.connect(), engine.connect():
            pass
    assert found(writer) == (6, 6)
    engine.dispose()
