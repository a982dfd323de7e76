"""Connections held for long are counted once and named in the log while they are held, against real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from demo_app.stack.servers import Postgres
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.probes.loops import total
from tests.support.measured import Measured, eventually

pytestmark = pytest.mark.alone

THRESHOLD = 0.2
HERE = __name__


@pytest.fixture(autouse=True)
def probe(writer: Writer) -> Iterator[PoolProbe]:
    probe = PoolProbe(load({}, hold_threshold=THRESHOLD))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture
async def engine(postgres: Postgres) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(postgres.url(driver="asyncpg"), pool_size=2, max_overflow=0, pool_logging_name="shop")
    yield engine
    await engine.dispose()


def long_holds(writer: Writer, route: str = "_outside") -> float:
    return writer.value("headroom_pool_long_holds_total", db_client_connection_pool_name="shop", http_route=route)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "has been held" in record.getMessage()]


async def past_the_threshold(probe: PoolProbe, holds: int = 1) -> None:
    """Look as the sampling thread does, from another thread, until so many holds are past the threshold.

    How long a hold has to begin, since it opens a connection first, depends on the machine.
    """
    writer = probe._writer
    assert writer is not None

    def counted() -> float:
        return total(writer, "headroom_pool_long_holds_total")

    before = counted()
    async with asyncio.timeout(10):
        while counted() < before + holds:
            await asyncio.sleep(0.02)
            await asyncio.to_thread(probe.sample)


async def use_session(session: AsyncSession) -> None:
    await session.execute(text("select 1"))


def line_of(function: Any, offset: int = 1) -> str:
    code = function.__code__
    return f"{HERE}:{code.co_qualname.replace('<locals>.', '')}:{code.co_firstlineno + offset}"


async def test_a_hold_is_named_while_it_lasts(
    probe: PoolProbe, writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The record names pool, route, the line of the checkout and its caller, the task, and where it stands now."""

    async def wait_for_another_service() -> None:
        await asyncio.sleep(3600)

    async def endpoint() -> None:
        request = Ledger("GET")
        request.route = "/orders/{id}"
        ledger.current.set(request)
        async with AsyncSession(engine) as session:
            await use_session(session)
            await wait_for_another_service()

    task = asyncio.create_task(endpoint(), name="the-holder")
    await past_the_threshold(probe)
    probe.sample()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (record,) = told(caplog)
    assert "pool shop" in record and "route /orders/{id}" in record and "task the-holder" in record
    assert f"checked out at {line_of(use_session)} < {line_of(endpoint, 5)};" in record
    assert f"stands at {line_of(wait_for_another_service)}" in record
    assert long_holds(writer, "/orders/{id}") == 1


async def test_a_session_that_is_kept_and_never_closed_is_named(
    probe: PoolProbe, writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A session leaked by a task that has ended is found within the threshold, by the line of its checkout."""
    kept: list[AsyncSession] = []

    async def leak() -> None:
        session = AsyncSession(engine)
        kept.append(session)
        await use_session(session)

    await asyncio.create_task(leak())
    probe.sample()
    assert not told(caplog)
    await past_the_threshold(probe)
    (record,) = told(caplog)
    assert f"checked out at {line_of(use_session)} < {line_of(leak, 3)};" in record
    assert "its task has ended and nothing gave the connection back" in record
    assert long_holds(writer) == 1
    await kept[0].close()
    assert long_holds(writer) == 1  # and not again as it comes back


async def test_a_session_leaked_by_a_request_is_named_with_its_route(
    probe: PoolProbe, writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that keeps its session is named by route and line, though its request was answered long ago."""
    app, kept = FastAPI(), []

    @app.get("/leaks/{number}")
    async def leak(number: int) -> int:
        kept.append(AsyncSession(engine))
        await use_session(kept[-1])
        return number

    measured = Measured(app)
    try:
        task = asyncio.create_task(measured.get("/leaks/7"))
        assert (await task).json() == 7
        await past_the_threshold(probe)
    finally:
        measured.probe.close()
    (record,) = told(caplog)
    assert "route /leaks/{number}," in record
    assert f"< {HERE}:test_a_session_leaked_by_a_request_is_named_with_its_route.leak:" in record
    assert "has ended" in record
    await kept[0].close()


async def test_a_session_that_its_running_task_has_left_is_named(
    probe: PoolProbe, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A leak in a task that lives on, such as a worker's loop, shows both where it was made and where the task is."""
    kept: list[AsyncSession] = []
    go_on = asyncio.Event()

    async def leak() -> None:
        kept.append(AsyncSession(engine))
        await use_session(kept[-1])

    async def loop_for_ever() -> None:
        await leak()
        await go_on.wait()

    task = asyncio.create_task(loop_for_ever())
    await past_the_threshold(probe)
    go_on.set()
    await task
    (record,) = told(caplog)
    assert f"checked out at {line_of(use_session)} < {line_of(leak, 2)};" in record
    assert f"stands at {line_of(loop_for_ever, 2)}" in record
    await kept[0].close()


async def test_a_context_manager_of_the_user_does_not_hide_who_uses_it(
    probe: PoolProbe, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkout within the user's own context manager is told with the line that enters it."""

    @asynccontextmanager
    async def unit_of_work() -> AsyncIterator[Any]:
        async with engine.begin() as connection:
            yield connection

    async def endpoint() -> None:
        async with unit_of_work():
            await past_the_threshold(probe)

    await endpoint()
    (record,) = told(caplog)
    assert ".unit_of_work:" in record and f"< {line_of(endpoint)};" in record


def test_a_sync_session_in_a_thread_is_named(
    probe: PoolProbe, writer: Writer, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """In a thread, too: where it was checked out and where the thread stands; and that the thread has ended."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
    done, kept = threading.Event(), []

    def wait_for_another_service() -> None:
        done.wait(60)

    def endpoint() -> None:
        with Session(engine) as session:
            session.execute(text("select 1"))
            wait_for_another_service()

    def leak() -> None:
        kept.append(Session(engine))
        kept[0].execute(text("select 1"))

    holder, leaker = threading.Thread(target=endpoint), threading.Thread(target=leak)
    leaker.start(), leaker.join()
    holder.start()
    eventually(lambda: count_used(engine) == 2)
    eventually(lambda: probe.sample() or len(told(caplog)) == 2)
    done.set()
    holder.join()
    standing, leaked = sorted(told(caplog), key=lambda record: "has ended" in record)
    assert f"checked out at {line_of(endpoint, 2)}" in standing
    assert f"its thread stands at {line_of(wait_for_another_service)}" in standing
    assert f"checked out at {line_of(leak, 2)}" in leaked and "its thread has ended or gone on" in leaked
    assert long_holds(writer) == 2
    kept[0].close()
    engine.dispose()


def test_each_way_to_a_connection_is_named(
    probe: PoolProbe, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Sessions and engines, used in turn and from stacks of any depth, are told by the lines that ask."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=20, pool_logging_name="shop")
    kept: list[Any] = []

    def by_session() -> None:
        kept.append(Session(engine))
        kept[-1].execute(text("select 1"))

    def by_scalars() -> None:
        kept.append(Session(engine))
        kept[-1].scalars(text("select 1"))

    def by_connect() -> None:
        kept.append(engine.connect())

    def by_begin() -> None:
        kept.append(engine.begin())
        kept[-1].__enter__()

    def by_raw_connection() -> None:
        kept.append(engine.raw_connection())

    ways = (by_session, by_scalars, by_connect, by_begin, by_raw_connection)

    def deeper(way: Any, levels: int) -> None:
        if levels:
            deeper(way, levels - 1)
        else:
            way()

    for levels, way in enumerate((*ways, *reversed(ways))):
        deeper(way, levels)
    eventually(lambda: probe.sample() or len(told(caplog)) >= len(ways))
    places = [record.partition("checked out at ")[2].partition(" < ") for record in told(caplog)]
    lines = {line_of(way, 1 if way in (by_connect, by_raw_connection) else 2) for way in ways}
    assert {place for place, _, _ in places} == lines
    assert all(f"{HERE}:test_each_way_to_a_connection_is_named.deeper:" in caller for _, _, caller in places)
    for one in kept:
        one.__exit__(None, None, None) if hasattr(one, "gen") else one.close()
    engine.dispose()


def count_used(engine: Any) -> int:
    used: int = engine.pool.checkedout()
    return used


async def test_a_long_hold_that_nobody_looked_at_counts(probe: PoolProbe, writer: Writer, engine: AsyncEngine) -> None:
    """A hold that ends between two looks is counted as it ends, a short one is not."""
    for seconds in (0.0, THRESHOLD + 0.02):
        async with engine.connect():
            await asyncio.sleep(seconds)
    assert long_holds(writer) == 1


async def test_the_log_tells_a_place_once_and_counts_all(
    probe: PoolProbe, writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Two leaks of one function within a minute are one record and two counts."""
    kept = [AsyncSession(engine), AsyncSession(engine)]
    for session in kept:
        await use_session(session)
    await past_the_threshold(probe, holds=2)
    assert len(told(caplog)) == 1
    assert long_holds(writer) == 2
    for session in kept:
        await session.close()


async def test_nothing_of_the_users_is_kept_alive(probe: PoolProbe, engine: AsyncEngine) -> None:
    """Noting the checkout keeps neither the task nor the variables of its frames: what they drop is given back."""
    dropped = threading.Event()

    class Large:
        def __del__(self) -> None:
            dropped.set()

    async def hold() -> Any:
        large = Large()
        connection = await engine.connect()
        assert large
        return connection

    task = asyncio.create_task(hold())
    connection = await task
    del task
    gc.collect()
    assert dropped.is_set()
    await connection.close()


async def test_run_sync_and_threads_of_a_request_are_named(
    probe: PoolProbe, engine: AsyncEngine, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Code that runs in a session's ``run_sync`` is named by the caller; a request's thread by its own line."""
    sync = create_engine(postgres.url(driver="psycopg"), pool_logging_name="sync")
    request = Ledger("GET")
    request.route = "/mixed"
    let_go = threading.Event()

    def in_thread() -> None:
        with sync.connect():
            let_go.wait(60)

    async def endpoint() -> None:
        ledger.current.set(request)
        async with AsyncSession(engine) as session:
            await session.run_sync(lambda inner: inner.execute(text("select 1")))
            await run_in_threadpool(in_thread)

    task = asyncio.get_running_loop().create_task(endpoint(), context=contextvars.Context())
    await past_the_threshold(probe, holds=2)
    let_go.set()
    await task
    shop, other = sorted(told(caplog), key=lambda record: "pool sync" in record)
    assert f"checked out at {line_of(endpoint, 3)}" in shop and f"stands at {line_of(endpoint, 4)}" in shop
    assert f"checked out at {line_of(in_thread)}" in other and f"its thread stands at {line_of(in_thread, 2)}" in other
    assert "route /mixed" in shop and "route /mixed" in other
    sync.dispose()


@pytest.fixture(autouse=True)
def _level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fastapi_headroom")
