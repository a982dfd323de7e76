"""Rows that the statements of a request gave back, by every driver that tells their number at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_headroom.probes.pool import PoolProbe
from tests.support.drivers import ASYNC, DRIVERS
from tests.support.measured import Measured

ROWS = "headroom_request_rows"
COUNT_TO = "with recursive n(i) as (select 1 union all select i + 1 from n where i < {}) select i from n"


@pytest.fixture
def measured(pool_probe: PoolProbe) -> Iterator[Measured]:
    """An app under both probes."""
    measured = Measured(FastAPI())
    yield measured
    measured.probe.close()


def serve(measured: Measured, driver: str, url: str) -> Any:
    """Add a route that reads 7 and 5 rows, changes 4 and reads none; return what disposes of its engine."""
    reads = [text(COUNT_TO.format(7)), text(COUNT_TO.format(5)), text("select 1 as i where 1 = 0")]
    make, fill = text("create temporary table if not exists t (i int)"), text("insert into t " + COUNT_TO.format(4))
    if driver in ASYNC:
        engine = create_async_engine(url)

        @measured.app.get("/rows")
        async def rows() -> int:
            async with AsyncSession(engine) as session:
                await session.execute(make)
                await session.execute(fill)
                await session.execute(text("update t set i = i + 1"))
                return sum([len((await session.execute(read)).all()) for read in reads])

        return engine.dispose

    sync = create_engine(url)

    @measured.app.get("/rows")
    def sync_rows() -> int:
        with Session(sync) as session:
            session.execute(make)
            session.execute(fill)
            session.execute(text("update t set i = i + 1"))
            return sum(len(session.execute(read).all()) for read in reads)

    async def dispose() -> None:
        sync.dispose()

    return dispose


@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver != "aiosqlite"])
async def test_rows_that_were_read_are_counted_per_request(measured: Measured, driver: str, url: str) -> None:
    """Two requests that read 12 rows each and change some are two observations and 24 rows, with each driver."""
    dispose = serve(measured, driver, url)
    for _ in range(2):
        assert (await measured.get("/rows")).json() == 12
    assert measured.value(f"{ROWS}_count", http_route="/rows") == 2
    assert measured.value(f"{ROWS}_sum", http_route="/rows") == 24
    await dispose()


@pytest.mark.parametrize("driver", ["aiosqlite"])
async def test_a_driver_that_does_not_tell_has_no_series(measured: Measured, driver: str, url: str) -> None:
    """SQLite knows the number when the last row was read: nothing is written, not 0 rows."""
    dispose = serve(measured, driver, url)
    assert (await measured.get("/rows")).json() == 12
    assert not [name for name, _ in measured.writer.samples() if name.startswith(ROWS)]
    await dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg-async", "asyncmy"])
async def test_a_server_side_cursor_is_left_out(measured: Measured, driver: str, url: str) -> None:
    """Of rows that stream from the server nobody knows the number beforehand; they are not taken for a number."""
    engine = create_async_engine(url)

    @measured.app.get("/stream")
    async def stream() -> int:
        async with engine.connect() as connection:
            result = await connection.stream(text(COUNT_TO.format(300)))
            return len([row async for row in result])

    assert (await measured.get("/stream")).json() == 300
    assert not [name for name, _ in measured.writer.samples() if name.startswith(ROWS)]
    await engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg"])
async def test_a_request_without_statements_is_left_out(measured: Measured, driver: str, url: str) -> None:
    """A route that asks no database has no series of rows; one whose statements found nothing has 0 rows."""
    engine = create_engine(url)

    @measured.app.get("/nothing")
    def nothing() -> int:
        with engine.connect() as connection:
            return len(connection.execute(text("select 1 where 1 = 0")).all())

    @measured.app.get("/idle")
    def idle() -> int:
        return 1

    await measured.get("/nothing")
    await measured.get("/idle")
    assert measured.nonzero(f"{ROWS}_count") == {("/nothing",): 1}
    assert measured.value(f"{ROWS}_sum", http_route="/nothing") == 0
    engine.dispose()
