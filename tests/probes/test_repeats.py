"""Statements that one request runs again and again are found, counted and told once, without their values."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI
from sqlalchemy import Column, ForeignKey, Integer, String, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, relationship, selectinload

from demo_app.stack.servers import Postgres
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.repeats import LAST
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.thresholds import REPEATED_STATEMENTS
from tests.support.measured import Measured

USERS = 30


class Base(DeclarativeBase):
    """The tables of this file."""


class Author(Base):
    """Somebody with books."""

    __tablename__ = "repeats_authors"
    id = Column(Integer, primary_key=True)
    name = Column(String)
    books = relationship("Book")


class Book(Base):
    """A book of an author."""

    __tablename__ = "repeats_books"
    id = Column(Integer, primary_key=True)
    author_id = Column(ForeignKey("repeats_authors.id"))


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture(autouse=True)
def probe(writer: Writer, caplog: pytest.LogCaptureFixture) -> Iterator[PoolProbe]:
    caplog.set_level(logging.WARNING, "fastapi_headroom")
    probe = PoolProbe(load({}))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture
async def engine(postgres: Postgres, probe: PoolProbe) -> AsyncIterator[AsyncEngine]:
    """A real database with authors and their books."""
    engine = create_async_engine(postgres.url(driver="asyncpg"))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Author), [{"id": i, "name": f"name-{i}"} for i in range(USERS)])
        await connection.execute(insert(Book), [{"author_id": i % USERS} for i in range(2 * USERS)])
    yield engine
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
    await engine.dispose()


def found(writer: Writer, route: str = "/authors") -> float:
    return writer.samples().get(("headroom_repeated_statements_total", (("http_route", route),)), 0.0)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "(N+1)" in record.getMessage()]


def request(route: str = "/authors") -> Ledger:
    """Begin a request."""
    begun = Ledger("GET")
    begun.route = route
    ledger.current.set(begun)
    return begun


async def run(engine: AsyncEngine, *statements: str) -> None:
    async with engine.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def test_lazy_loads_of_real_requests_are_found_once(
    writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that reads each author's books by a statement of its own counts per request and is told once."""
    app = FastAPI()

    @app.get("/authors/{shelf}")
    async def list_authors(shelf: str, lazy: bool) -> int:
        query = select(Author).order_by(Author.id)
        async with AsyncSession(engine) as session:
            if lazy:
                authors = (await session.scalars(query)).all()
                return sum([len(await books_of(session, author.id)) for author in authors])
            authors = (await session.scalars(query.options(selectinload(Author.books)))).all()
            return sum(len(author.books) for author in authors)

    async def books_of(session: AsyncSession, author_id: int) -> list[Book]:
        return list((await session.scalars(select(Book).where(Book.author_id == author_id))).all())

    measured = Measured(app)
    try:
        async with measured.client() as client:
            for lazy in (True, False, True, True):
                assert (await client.get(f"/authors/top?lazy={lazy}")).json() == 2 * USERS
    finally:
        measured.probe.close()
    assert found(writer, "/authors/{shelf}") == 3
    (record,) = told(caplog)
    assert "route /authors/{shelf} " in record and "FROM repeats_books WHERE repeats_books.author_id = ?" in record
    assert f"{__name__}:test_lazy_loads_of_real_requests_are_found_once.books_of:" in record


@pytest.mark.parametrize("times", [REPEATED_STATEMENTS - 1, REPEATED_STATEMENTS, 3 * REPEATED_STATEMENTS])
async def test_ten_are_many(writer: Writer, engine: AsyncEngine, times: int) -> None:
    """Nine of one statement are no finding, ten and thirty are one, wherever other statements stand between."""
    request()
    await run(engine, *["select 'first'::text || 'a'", *["select 1 as one", "select now()"] * times][: 2 * times + 1])
    assert found(writer) == (0 if times < REPEATED_STATEMENTS else 2)
    request()
    await run(engine, *[f"select 1 as {'abcdefghijklmnopqrstuvwxyz'[i % 26]}{i}" for i in range(times)])
    assert found(writer) == (0 if times < REPEATED_STATEMENTS else 2)  # other statements each


async def test_values_written_into_the_text_are_no_difference(
    writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Statements whose text differs by a number or a string are the same, and the value is not told."""
    request()
    await run(engine, *[f"select {i} as n, 'hunter{i}' as s" for i in range(REPEATED_STATEMENTS)])
    assert found(writer) == 1
    (record,) = told(caplog)
    assert "select ? as n, ? as s" in record and "hunter" not in record


async def test_many_rows_in_one_statement_are_no_repetition(writer: Writer, engine: AsyncEngine) -> None:
    """executemany, an insert of many rows and lists of any length are one statement each."""
    request()
    async with engine.begin() as connection:
        await connection.execute(text("select :x"), [{"x": str(i)} for i in range(50)])
        await connection.execute(insert(Book).returning(Book.id), [{"author_id": 1} for _ in range(3_000)])
        await connection.execute(select(Book).where(Book.id.in_(range(50))))
    assert found(writer) == 0


async def test_statements_that_run_at_once_count(writer: Writer, engine: AsyncEngine) -> None:
    """Ten at the same time, each on a connection of its own, are found as well as ten in a row."""
    request()
    await asyncio.gather(*(run(engine, "select pg_sleep(0.01)") for _ in range(REPEATED_STATEMENTS)))
    assert found(writer) == 1


async def test_work_outside_of_requests_and_the_next_request_begin_anew(writer: Writer, engine: AsyncEngine) -> None:
    """A job outside of any request may repeat itself; what two requests run together is nobody's repetition."""
    ledger.current.set(None)
    await run(engine, *["select 1"] * 2 * REPEATED_STATEMENTS)
    for _ in range(2):
        request()
        await run(engine, *["select 1"] * (REPEATED_STATEMENTS - 1))
    assert found(writer) == 0


async def test_a_long_request_is_bounded(writer: Writer, engine: AsyncEngine) -> None:
    """Of a request with very many statements no more than the first ones are kept in mind."""
    begun = request()
    await run(engine, *[f"select 1 as a{i}" for i in range(LAST + 50)])
    assert begun.queries == LAST + 50
    assert begun.texts is None and begun.shapes is not None and len(begun.shapes) <= 2 * LAST
