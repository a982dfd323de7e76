"""``headroom.autosize`` on real PostgreSQL: the limit follows the load, says so, and goes back where it was."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool

import fastapi_headroom as headroom
from demo_app.stack.servers import Postgres
from fastapi_headroom import testing as headroom_testing
from fastapi_headroom.advice import autosizing
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes import pool_autosize
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.claims import Claims
from fastapi_headroom.store.writer import Writer

pytestmark = pytest.mark.alone

LABELS = {"db_client_connection_pool_name": "shop"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time scale."""
    monkeypatch.setattr(pool_autosize, "TICK", 0.05)
    monkeypatch.setattr(autosizing, "WINDOW", 1.0)
    monkeypatch.setattr(autosizing, "LATELY", 0.5)
    monkeypatch.setattr(autosizing, "STEP_DOWN", 0.1)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer.open(tmp_path)
    yield writer
    writer.close()


@pytest.fixture
def probe(tmp_path: Path, writer: Writer) -> Iterator[PoolProbe]:
    probe = PoolProbe(load({}, directory=tmp_path))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture
async def engine(postgres: Postgres) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=3, max_overflow=2, pool_timeout=20, pool_logging_name="shop"
    )
    yield engine
    await engine.dispose()


async def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def claims_of(directory: Path) -> Path:
    (path,) = directory.glob("pool-shop-*.claims")
    return path


async def crowd(engine: AsyncEngine, callers: int, stop: asyncio.Event) -> None:
    async def caller() -> None:
        while not stop.is_set():
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                await asyncio.sleep(0.05)  # long enough for the loop not to be what is short

    await asyncio.gather(*(caller() for _ in range(callers)))


async def test_an_async_pool_grows_under_load_shrinks_after_it_and_goes_back(
    probe: PoolProbe, writer: Writer, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """From 2 to at least 8 for eight callers, to 2 a second after; each change is counted and logged; 3 + 2 at last."""
    caplog.set_level(logging.INFO, "fastapi_headroom")
    sizing = headroom.autosize(engine, 2, 12, 12, patience=1.0)
    pool: Any = engine.sync_engine.pool
    assert sizing.active
    await until(lambda: sizing.limit == 2, "it begins at the minimum")
    stop = asyncio.Event()
    load = asyncio.create_task(crowd(engine, 8, stop))
    await until(lambda: (sizing.limit or 0) >= 8, "it grows")
    await until(lambda: len(pool._fastapi_headroom.held) == 8, "and those who waited have a connection each")
    assert len(pool._fastapi_headroom.waiting) == 0
    stop.set()
    await load
    await until(lambda: sizing.limit == 2 and pool.checkedin() <= 2, "it shrinks when nobody asks any more")
    grown = writer.value("headroom_pool_autosize_changes_total", **LABELS, direction="grow", reason="demand")
    shrunk = writer.value("headroom_pool_autosize_changes_total", **LABELS, direction="shrink", reason="idle")
    lines = [record.getMessage() for record in caplog.records]
    assert grown >= 2 and sum("grows from" in line for line in lines) == grown, lines
    assert shrunk >= 2 and sum("shrinks from" in line for line in lines) == shrunk, lines
    probe.sample()
    assert writer.value("db_client_connection_max", **LABELS) == 2
    assert writer.value("headroom_pool_autosize_maximum", **LABELS) == 12
    assert writer.value("headroom_pool_autosize_budget", **LABELS) == 12
    sizing.stop()
    sizing.stop()
    assert (pool._pool.maxsize, pool._max_overflow, sizing.limit) == (3, 2, None)


def test_a_pool_for_threads_follows_its_load(probe: PoolProbe, writer: Writer, postgres: Postgres) -> None:
    """Eight threads make a pool of psycopg connections grow, and it gives back what nobody needs."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=5, pool_logging_name="shop", pool_timeout=20)
    sizing = headroom.autosize(engine, 1, 10, 10, patience=1.0)
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            with engine.connect() as connection:
                connection.execute(text("SELECT pg_sleep(0.05)"))

    with ThreadPoolExecutor(8) as threads:
        users = [threads.submit(use) for _ in range(8)]
        deadline = time.monotonic() + 10
        while (sizing.limit or 0) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        highest = sizing.limit or 0
        stop.set()
        for user in users:
            user.result()
    assert highest >= 8
    deadline = time.monotonic() + 10
    while sizing.limit != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sizing.limit == 1
    assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    sizing.stop()
    engine.dispose()


async def test_two_workers_divide_the_budget_and_a_busy_one_makes_room(
    probe: PoolProbe, engine: AsyncEngine, tmp_path: Path, postgres: Postgres
) -> None:
    """One that has all of ten makes room for another worker that asks for six: five each, though all are in use."""
    sizing = headroom.autosize(engine, 1, 10, 10, patience=1.0)
    stop = asyncio.Event()
    load = asyncio.create_task(crowd(engine, 14, stop))
    await until(lambda: sizing.limit == 10, "alone it may have all")
    other = Claims(claims_of(tmp_path))
    got = 0

    def ask() -> bool:
        nonlocal got
        with other.change() as change:
            assert change.taken + change.mine.claimed <= 10
            got = change.write(6, 6, 1, 10).claimed
        return got == 5

    await until(ask, "the other one gets its share")
    await until(lambda: sizing.limit == 5, "of what the first one had")
    other.close()
    await until(lambda: sizing.limit == 10, "which takes it back when the other one is gone")
    stop.set()
    await load
    sizing.stop()


async def test_dispose_gives_a_pool_that_is_sized_on(probe: PoolProbe, engine: AsyncEngine) -> None:
    """The pool after dispose() counts what is still out of the old one, and follows the load like the first."""
    sizing = headroom.autosize(engine, 2, 6, 6, patience=1.0)
    stop = asyncio.Event()
    load = asyncio.create_task(crowd(engine, 9, stop))
    await until(lambda: sizing.limit == 6, "it grows")
    stop.set()
    await load
    held = [await engine.connect() for _ in range(2)]
    old: Any = engine.sync_engine.pool
    await engine.dispose()
    pool: Any = engine.sync_engine.pool
    assert pool is not old
    assert (sizing.limit or 0) <= 4, "two of the six are still out"
    for connection in held:
        await connection.close()
    assert old.checkedin() == 0, "what comes back to the old pool is closed"
    stop.clear()
    load = asyncio.create_task(crowd(engine, 9, stop))
    await until(lambda: sizing.limit == 6, "it grows again")
    stop.set()
    await load
    sizing.stop()
    assert (pool._pool.maxsize, pool._max_overflow) == (3, 2)


async def test_closing_the_probe_puts_limits_back_and_binding_it_begins_anew(
    probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """What shutdown() and a capture of metrics do: the original limit in between, and sized again afterwards."""
    sizing = headroom.autosize(engine, 1, 6, 6)
    pool: Any = engine.sync_engine.pool
    await until(lambda: pool._pool.maxsize == 1, "it is sized")
    probe.close()
    assert (pool._pool.maxsize, pool._max_overflow) == (3, 2)
    assert not sizing.active
    probe.bind(writer)
    await until(lambda: pool._pool.maxsize == 1, "it is sized again")
    sizing.stop()


async def test_a_forked_child_leaves_the_claims_to_its_parent(
    probe: PoolProbe, engine: AsyncEngine, tmp_path: Path
) -> None:
    """In a child of a serving process nothing is sized, and the parent's claim stays the parent's."""
    sizing = headroom.autosize(engine, 2, 6, 6)
    await until(lambda: sizing.limit == 2, "it is sized")
    watcher = Claims(claims_of(tmp_path))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not sizing.active and pool_autosize._running is None else 1)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    with watcher.change() as change:
        assert change.taken == 2
    watcher.close()
    assert sizing.active
    sizing.stop()


async def test_without_a_store_it_stays_at_the_minimum(
    probe: PoolProbe, engine: AsyncEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where workers cannot see each other nobody grows, and the log says why."""
    probe.settings = load({}, directory=tmp_path / "gone")
    sizing = headroom.autosize(engine, 2, 6, 6)
    stop = asyncio.Event()
    load_ = asyncio.create_task(crowd(engine, 6, stop))
    await until(lambda: len(engine.sync_engine.pool._fastapi_headroom.waiting) >= 4, "they wait")  # type: ignore[attr-defined]
    await asyncio.sleep(0.3)
    assert sizing.limit == 2
    assert "does not grow for now" in caplog.text
    stop.set()
    await load_
    sizing.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 4, 20), "minimum=5 is above maximum=4"),
        ((0, 4, 20), "minimum=0 must be a whole number"),
        ((1, 4.5, 20), "maximum=4.5 must be a whole number"),
        ((1, True, 20), "maximum=True must be"),
        ((4, 8, 3), "budget=3 is less than 1 workers x minimum=4"),
        ((1, 8, -1), "budget=-1 must be"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    """Each wrong bound is named with its number and what to do."""
    engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(SettingsError, match=message):
        headroom.autosize(engine, *arguments)
    assert engine.pool.size() == 5  # type: ignore[attr-defined]


def test_other_arguments_that_make_no_sense_are_refused() -> None:
    """Workers that the budget cannot serve, patience that is none, and what is no engine."""
    engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(SettingsError, match="budget=10 is less than 4 workers x minimum=3; raise the budget"):
        headroom.autosize(engine, 3, 8, 10, workers=4)
    with pytest.raises(SettingsError, match="workers=0 must be"):
        headroom.autosize(engine, 3, 8, 10, workers=0)
    for patience in (0, math.nan, math.inf, "x"):
        with pytest.raises(SettingsError, match="patience="):
            headroom.autosize(engine, 3, 8, 10, patience=patience)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"autosize\(str\) is no SQLAlchemy engine; give what create_engine"):
        headroom.autosize("postgresql://", 1, 2, 2)


@pytest.mark.parametrize("poolclass", [NullPool, StaticPool, SingletonThreadPool])
def test_a_pool_without_a_limit_is_refused_with_the_remedy(poolclass: Any) -> None:
    """The error names the pool that was found and the ones that have a limit to move."""
    engine = create_engine("sqlite://", poolclass=poolclass)
    with pytest.raises(SettingsError, match=f"this engine has {poolclass.__name__}.*poolclass=QueuePool"):
        headroom.autosize(engine, 1, 2, 2)


def test_a_budget_that_the_known_workers_exceed_leaves_the_pool_alone(
    tmp_path: Path, writer: Writer, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """WEB_CONCURRENCY is deployment: too many workers for the budget are told in the log, and the app goes on."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=3)
    sizing = headroom.autosize(engine, 2, 4, 6)
    probe = PoolProbe(load({}, directory=tmp_path, expected_workers=4))
    probe.bind(writer)
    assert "budget=6 is less than 4 workers x minimum=2" in caplog.text
    assert not sizing.active
    assert engine.pool.size() == 3  # type: ignore[attr-defined]
    probe.close()
    sizing.stop()


async def test_pools_without_a_limit_of_their_own_get_one_and_lose_it_again(
    probe: PoolProbe, postgres: Postgres
) -> None:
    """pool_size=0 and max_overflow=-1 mean no limit: the bounds hold meanwhile, and both come back as they were."""
    for size, overflow in ((0, -1), (4, -1)):
        engine = create_async_engine(postgres.url(driver="asyncpg"), pool_size=size, max_overflow=overflow)
        sizing = headroom.autosize(engine, 1, 3, 3)
        stop = asyncio.Event()
        load_ = asyncio.create_task(crowd(engine, 6, stop))
        await until(lambda: sizing.limit == 3, "it grows")  # noqa: B023
        assert engine.sync_engine.pool.checkedout() <= 3  # type: ignore[attr-defined]
        stop.set()
        await load_
        sizing.stop()
        pool: Any = engine.sync_engine.pool
        assert (pool._pool.maxsize, pool._max_overflow) == (size, overflow)
        assert pool.checkedin() <= 3
        await engine.dispose()


async def test_while_metrics_are_captured_a_pool_grows_without_a_store(postgres: Postgres, engine: AsyncEngine) -> None:
    """A user's test that captures metrics is no worker among others: no file, and no wait for a budget."""
    with headroom_testing.capture_metrics():
        handle = headroom.init_worker(exporter=False, tracing=False)
        sizing = headroom.autosize(engine, 1, 4, 4)
        stop = asyncio.Event()
        load_ = asyncio.create_task(crowd(engine, 6, stop))
        await until(lambda: sizing.limit == 4, "it grows")
        stop.set()
        await load_
        handle.shutdown()
    sizing.stop()


def test_an_engine_that_is_gone_frees_its_claim(probe: PoolProbe, postgres: Postgres, tmp_path: Path) -> None:
    """An engine that its user drops takes its claim with it, without stop()."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
    headroom.autosize(engine, 2, 4, 4)
    watcher = Claims(claims_of(tmp_path))
    with watcher.change() as change:
        assert change.taken == 2
    engine.dispose()
    del engine
    gc.collect()
    with watcher.change() as change:
        assert change.taken == 0
    watcher.close()
