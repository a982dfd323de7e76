"""SQL statements are timed by operation and outcome, and counted for the request that runs them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, exc, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from demo_app.stack.servers import Postgres
from fastapi_headroom import ledger
from fastapi_headroom.ledger import DB, Ledger
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.statements import MAX_TEXTS, operation_name
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

DURATION = "db_client_operation_duration_seconds"


@pytest.fixture(autouse=True)
def probe(writer: Writer) -> Iterator[PoolProbe]:
    probe = PoolProbe(load({}))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture
async def engine(postgres: Postgres) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(postgres.url(driver="asyncpg"), pool_size=2, max_overflow=0)
    yield engine
    await engine.dispose()


def counts(writer: Writer) -> dict[tuple[str, str, str], float]:
    """Return how many statements were counted: (system, operation, error) -> number."""
    found = {}
    for (name, labels), number in writer.samples().items():
        if name == f"{DURATION}_count":
            by_name = dict(labels)
            found[by_name["db_system_name"], by_name["db_operation_name"], by_name["error_type"]] = number
    return found


@pytest.mark.parametrize(
    ("sql", "operation"),
    [
        ("SELECT 1", "SELECT"),
        ("  select 1", "SELECT"),
        ("-- why\n/* where */ UPDATE t SET a = 1", "UPDATE"),
        ("(SELECT 1) UNION (SELECT 2)", "SELECT"),
        ("WITH x AS (SELECT 1) SELECT * FROM x", "SELECT"),
        ("Truncate t", "TRUNCATE"),
        ("secret_procedure 5", "OTHER"),
        ("", "OTHER"),
    ],
)
def test_operation_names_are_bounded(sql: str, operation: str) -> None:
    """The operation is the first keyword, and nothing else of a statement."""
    assert operation_name(sql) == operation


async def test_statements_are_timed_and_counted(writer: Writer, engine: AsyncEngine) -> None:
    """Each statement counts once by its operation; the dialect's own ones on a new connection do not."""
    books = Ledger("GET")
    ledger.current.set(books)
    async with engine.connect() as connection:
        began = time.perf_counter()
        await connection.execute(text("select 1"))
        await connection.execute(text("select pg_sleep(0.1)"))
        took = time.perf_counter() - began
        await connection.commit()
    books.finish(time.perf_counter())
    assert counts(writer) == {("postgresql", "SELECT", ""): 2, ("postgresql", "COMMIT", ""): 1}
    slow = writer.value(f"{DURATION}_sum", db_system_name="postgresql", db_operation_name="SELECT", error_type="")
    assert 0.1 <= slow <= took
    assert books.queries == 2
    assert books.seconds[DB] >= 0.1
    assert books.waits == []


async def test_failed_and_cancelled_statements(writer: Writer, engine: AsyncEngine) -> None:
    """A statement that fails or is cancelled is timed with its type of error, and the ledger's wait is closed."""
    books = Ledger("GET")
    ledger.current.set(books)
    async with engine.connect() as connection:
        with pytest.raises(exc.ProgrammingError):
            await connection.execute(text("select * from nowhere"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), engine.connect() as connection:
            await connection.execute(text("select pg_sleep(5)"))
    found = counts(writer)
    assert found["postgresql", "SELECT", "ProgrammingError"] == 1
    assert found["postgresql", "SELECT", "CancelledError"] == 1
    assert books.waits == []


def test_many_rows_are_one_statement(writer: Writer) -> None:
    """An INSERT of many rows, with or without RETURNING, is one statement."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    table = Table("t", metadata := MetaData(), Column("id", Integer, primary_key=True), Column("name", String))
    with engine.begin() as connection:
        metadata.create_all(connection)
        before = counts(writer)
        connection.execute(insert(table), [{"name": "a"}, {"name": "b"}])
        connection.execute(insert(table).returning(table.c.id), [{"name": "c"}, {"name": "d"}])
        assert len(connection.execute(select(table)).all()) == 4
    assert counts(writer)["sqlite", "INSERT", ""] - before.get(("sqlite", "INSERT", ""), 0) == 2
    assert counts(writer)["sqlite", "SELECT", ""] == 1
    assert counts(writer)["sqlite", "COMMIT", ""] == 1


def test_remembered_texts_are_few_and_all_statements_count(writer: Writer, probe: PoolProbe) -> None:
    """Statements whose texts are ever new are counted by their operation like others, and are not all kept."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.connect() as connection:
        for number in range(MAX_TEXTS + 50):
            connection.exec_driver_sql(f"select {number}")
    assert counts(writer)["sqlite", "SELECT", ""] == MAX_TEXTS + 50
    assert len(probe.statements._by_text["sqlite"]) <= MAX_TEXTS
