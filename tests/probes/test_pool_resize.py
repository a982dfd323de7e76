"""The limit of a live pool is moved on real PostgreSQL, and nothing is lost: neither a place nor a waiter."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.pool_resize import Resizer, limits_of
from fastapi_headroom.probes.pool_series import STATE_KEY
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

APPLICATION = "headroom-resize"
PATIENCE = 60.0
"""Seconds after which a caller that nobody woke gives up, longer than any test waits for it."""


@pytest.fixture
def probe() -> Iterator[PoolProbe]:
    writer = Writer.in_memory()
    probe = PoolProbe(load({}))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture(params=[False, True], ids=["fifo", "lifo"])
async def engine(request: Any, postgres: Postgres, probe: PoolProbe) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=2, max_overflow=1, pool_timeout=PATIENCE, pool_use_lifo=request.param,
        connect_args={"server_settings": {"application_name": APPLICATION}},
    )  # fmt: skip
    yield engine
    await engine.dispose()


@pytest.fixture(params=[False, True], ids=["fifo", "lifo"])
def threads_engine(request: Any, postgres: Postgres, probe: PoolProbe) -> Iterator[Engine]:
    engine = create_engine(
        postgres.url(driver="psycopg"), pool_size=2, max_overflow=1, pool_timeout=PATIENCE, pool_use_lifo=request.param,
        connect_args={"application_name": APPLICATION},
    )  # fmt: skip
    yield engine
    engine.dispose()


def resizer_of(engine: Any, probe: PoolProbe) -> Resizer:
    owner = getattr(engine, "sync_engine", engine)
    state = probe.state_of(owner.pool, owner)
    assert state is not None
    return Resizer(owner.pool, limits_of(owner.pool), lambda: len(vars(owner.pool)[STATE_KEY].waiting))


async def close(resizer: Resizer, records: list[Any]) -> None:
    for record in records:
        await greenlet_spawn(resizer.close, record)


def open_on_server(postgres: Postgres, expected: int) -> int:
    """Return how many connections the server has of ours, when they are as many as expected or after half a minute."""
    watcher = create_engine(postgres.url(driver="psycopg"))
    try:
        with watcher.connect() as connection:
            deadline = time.monotonic() + PATIENCE / 2
            while True:
                query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"
                found = int(connection.execute(text(query), {"name": APPLICATION}).scalar_one())
                connection.rollback()
                if found == expected or time.monotonic() > deadline:
                    return found
                time.sleep(0.01)
    finally:
        watcher.dispose()


async def test_waiters_are_woken_at_once_when_the_limit_rises(engine: AsyncEngine, probe: PoolProbe) -> None:
    """Four that wait for a pool of one that is held get a connection as its limit rises to five."""
    resizer = resizer_of(engine, probe)
    resizer.resize(1)
    held = await engine.connect()
    got = 0
    all_have_one = asyncio.Event()

    async def ask() -> None:
        nonlocal got
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            got += 1
            if got == 4:
                all_have_one.set()
            await all_have_one.wait()  # nobody gets one that another gave back

    tasks = [asyncio.create_task(ask()) for _ in range(4)]
    while len(vars(engine.sync_engine.pool)[STATE_KEY].waiting) < 4:
        await asyncio.sleep(0.005)
    assert not got
    resizer.resize(5)
    await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE / 2)
    assert (resizer.places, resizer.limit) == (5, 5)
    await held.close()


def test_threads_that_wait_are_woken_at_once(threads_engine: Engine, probe: PoolProbe) -> None:
    """The same with threads and a pool for threads."""
    resizer = resizer_of(threads_engine, probe)
    resizer.resize(1)
    held = threads_engine.connect()
    done = threading.Event()

    def ask() -> None:
        with threads_engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            done.wait(PATIENCE)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(4)]
        while len(vars(threads_engine.pool)[STATE_KEY].waiting) < 4:
            time.sleep(0.005)
        resizer.resize(5)
        deadline = time.monotonic() + PATIENCE / 2
        while len(vars(threads_engine.pool)[STATE_KEY].held) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        used = len(vars(threads_engine.pool)[STATE_KEY].held)
        done.set()
        for task in asked:
            task.result()
    assert used == 5
    held.close()


async def test_shrinking_takes_what_lies_ready_and_nothing_that_is_used(
    engine: AsyncEngine, probe: PoolProbe, postgres: Postgres
) -> None:
    """Of six connections, two in use, four go to make it two; a limit of one waits until the second comes back."""
    resizer = resizer_of(engine, probe)
    resizer.resize(6)
    held = [await engine.connect() for _ in range(6)]
    for connection in held[2:]:
        await connection.close()
    dropped = resizer.resize(1)
    assert len(dropped) == 4
    assert (resizer.places, resizer.limit, resizer.used) == (2, 2, 2), "never below what is in use"
    await close(resizer, dropped)
    assert resizer.closing == 0
    assert open_on_server(postgres, 2) == 2
    for connection in held[:2]:
        assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
    await held[0].close()
    assert (resizer.places, resizer.limit, resizer.used) == (1, 1, 1)
    await held[1].close()
    assert (resizer.places, resizer.limit, resizer.used) == (1, 1, 0)
    assert open_on_server(postgres, 1) == 1


async def test_a_pool_that_may_open_nothing_keeps_its_callers_waiting(engine: AsyncEngine, probe: PoolProbe) -> None:
    """A limit of 0 is no limit to SQLAlchemy; ours lets nobody in, times out as before, and lets go at once."""
    resizer = resizer_of(engine, probe)
    resizer.resize(0)
    engine.sync_engine.pool._timeout = 0.1  # type: ignore[attr-defined]
    with pytest.raises(exc.TimeoutError):
        await engine.connect()
    assert (resizer.places, resizer.limit) == (0, 0)
    engine.sync_engine.pool._timeout = PATIENCE  # type: ignore[attr-defined]
    waiting = asyncio.create_task(engine.connect().start())
    while not vars(engine.sync_engine.pool)[STATE_KEY].waiting:
        await asyncio.sleep(0.005)
    resizer.resize(1)
    connection = await asyncio.wait_for(waiting, PATIENCE / 2)
    assert (resizer.places, resizer.limit) == (1, 1)
    await connection.close()


async def test_the_original_limit_comes_back(engine: AsyncEngine, probe: PoolProbe) -> None:
    """After restore() size, overflow and what is open are what they would have been, in use or not."""
    resizer, pool = resizer_of(engine, probe), engine.sync_engine.pool
    resizer.resize(6)
    held = [await engine.connect() for _ in range(6)]
    for connection in held[3:]:
        await connection.close()
    await close(resizer, resizer.restore())
    assert limits_of(pool) == (2, 1)
    assert pool.checkedout() == 3  # type: ignore[attr-defined]
    assert "_do_return_conn" not in vars(pool)
    for connection in held[:3]:
        await connection.close()
    for connection in [await engine.connect() for _ in range(3)]:  # beyond its size it keeps none that was used
        await connection.close()
    assert (pool.checkedout(), pool.checkedin()) == (0, 2)  # type: ignore[attr-defined]


async def test_cancellations_while_the_limit_moves_lose_nothing(
    engine: AsyncEngine, probe: PoolProbe, postgres: Postgres
) -> None:
    """2,500 checkouts are cancelled at random while the limit jumps: places are what the server has."""
    rng = random.Random(7)
    resizer = resizer_of(engine, probe)
    highest = 0

    async def caller(number: int) -> None:
        rng = random.Random(number)
        for _ in range(100):
            task = asyncio.create_task(use(rng.random() * 0.002))
            await asyncio.sleep(rng.random() * 0.003)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass

    async def use(seconds: float) -> None:
        async with engine.connect():
            await asyncio.sleep(seconds)

    over = asyncio.Event()

    async def move() -> None:
        nonlocal highest
        while not over.is_set():
            await close(resizer, resizer.resize(rng.randint(0, 8)))
            highest = max(highest, resizer.places)
            await asyncio.sleep(0.002)

    mover = asyncio.create_task(move())
    await asyncio.gather(*(caller(number) for number in range(25)))
    over.set()
    await mover
    await close(resizer, resizer.resize(3))
    assert 3 < highest <= 8
    assert resizer.used == 0
    assert resizer.places <= 3
    for connection in [await engine.connect() for _ in range(3)]:
        await connection.close()
    assert (resizer.places, resizer.used, resizer.closing) == (3, 0, 0)
    assert open_on_server(postgres, 3) == 3


def test_eight_threads_while_the_limit_moves_lose_nothing(
    threads_engine: Engine, probe: PoolProbe, postgres: Postgres
) -> None:
    """Eight threads check out, some with time-outs, while the limit jumps: places are what the server has."""
    resizer = resizer_of(threads_engine, probe)
    threads_engine.pool._timeout = 0.02  # type: ignore[attr-defined]
    stop = threading.Event()
    most = 0
    lock = threading.Lock()
    out = 0
    served_all = 0

    def use(number: int) -> tuple[int, int]:
        nonlocal most, out, served_all
        rng, served, refused = random.Random(number), 0, 0
        while not stop.is_set():
            try:
                with threads_engine.connect():
                    with lock:
                        out += 1
                        most = max(most, out)
                    time.sleep(rng.random() * 0.003)
                    with lock:
                        out -= 1
                        served_all += 1
                served += 1
            except exc.TimeoutError:
                refused += 1
        return served, refused

    rng = random.Random(3)
    with ThreadPoolExecutor(8) as pool:
        users = [pool.submit(use, number) for number in range(8)]
        moves, deadline = 0, time.monotonic() + PATIENCE / 2
        while moves < 300 or (served_all <= 100 and time.monotonic() < deadline):
            for record in resizer.resize(rng.randint(0, 6)):
                resizer.close(record)
            moves += 1
            time.sleep(0.005)
        stop.set()
        results = [user.result() for user in users]
    assert sum(served for served, _ in results) > 100
    assert sum(refused for _, refused in results) > 0
    assert most <= 6
    for record in resizer.resize(3):
        resizer.close(record)
    threads_engine.pool._timeout = PATIENCE  # type: ignore[attr-defined]
    for connection in [threads_engine.connect() for _ in range(3)]:
        connection.close()
    assert (resizer.places, resizer.used, resizer.closing) == (3, 0, 0)
    assert open_on_server(postgres, 3) == 3
