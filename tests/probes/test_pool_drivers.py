"""The pool probe with each driver of SQLAlchemy, against the truth of clocks, pools and the server."""

from __future__ import annotations

import asyncio
import contextvars
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import create_engine, event, exc, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AssertionPool

from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.store.writer import Writer
from tests.support.drivers import ASYNC, DRIVERS, system_of

pytestmark = pytest.mark.alone

POOL = {"db_client_connection_pool_name": "shop"}
WAIT = "db_client_connection_wait_time_seconds"


class Users:
    """Users of one engine, alike for sync drivers (each user has a thread) and async ones."""

    def __init__(self, driver: str, url: str, **options: Any) -> None:
        self.is_async = driver in ASYNC
        make: Any = create_async_engine if self.is_async else create_engine
        self.engine: Any = make(url, pool_logging_name="shop", **options)
        self.pool: Any = self.engine.pool
        self._threads = ThreadPoolExecutor(48)

    async def use(self, seconds: float, end: str = "close") -> float:
        """Check out, run a statement, hold; return what the own clock says of the checkout."""
        if not self.is_async:
            context = contextvars.copy_context()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, context.run, self._use, seconds, end)
        asked = time.perf_counter()
        async with self.engine.connect() as connection:
            waited = time.perf_counter() - asked
            await connection.execute(text("select 1"))
            await asyncio.sleep(seconds)
            if end == "invalidate":
                await connection.invalidate()
            elif end == "fail":
                raise ZeroDivisionError
        return waited

    def _use(self, seconds: float, end: str) -> float:
        asked = time.perf_counter()
        with self.engine.connect() as connection:
            waited = time.perf_counter() - asked
            connection.execute(text("select 1"))
            time.sleep(seconds)
            if end == "invalidate":
                connection.invalidate()
            elif end == "fail":
                raise ZeroDivisionError
        return waited

    async def warm(self, connections: int) -> None:
        """Open connections, so that none is made while something is timed."""
        await asyncio.gather(*(self.use(0.05) for _ in range(connections)))

    async def dispose(self) -> None:
        """Close all connections."""
        if self.is_async:
            await self.engine.dispose()
        else:
            self.engine.dispose()
        self._threads.shutdown()


def count(writer: Writer, state: str) -> float:
    return writer.value("db_client_connection_count", db_client_connection_state=state, **POOL)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_every_driver_is_measured(pool_probe: PoolProbe, writer: Writer, driver: str, url: str) -> None:
    """Checkout, statement, wait and time-out are measured alike with each driver, sync and async."""
    users = Users(driver, url, pool_size=2, max_overflow=0, pool_timeout=0.35)
    await users.warm(2)
    for _ in range(8):  # until the machine let them run side by side
        before = writer.value(f"{WAIT}_sum", **POOL)
        truth = sorted(await asyncio.gather(*(users.use(0.1) for _ in range(6))))
        measured = writer.value(f"{WAIT}_sum", **POOL) - before
        expected = (0, 0, 0.1, 0.1, 0.2, 0.2)
        disturbed = not all(abs(a - b) < 0.04 for a, b in zip(truth, expected, strict=True))
        if not disturbed:
            break
    assert not disturbed, truth
    assert sum(truth) - 6 * 0.01 < measured <= sum(truth) + 0.002
    assert writer.value("db_client_connection_create_time_seconds_count", **POOL) == 2
    timeouts = writer.value("db_client_connection_timeouts_total", **POOL)
    holders = [asyncio.ensure_future(users.use(0.7)) for _ in range(2)]
    async with asyncio.timeout(5):
        while users.pool.checkedout() < 2:
            await asyncio.sleep(0.01)
    with pytest.raises(exc.TimeoutError):
        await users.use(0)
    assert writer.value("db_client_connection_timeouts_total", **POOL) - timeouts == 1
    await asyncio.gather(*holders)
    pool_probe.sample()
    assert (count(writer, "used"), count(writer, "idle")) == (0, 2)
    assert writer.value(
        "db_client_operation_duration_seconds_count",
        db_system_name=system_of(driver), db_operation_name="SELECT", error_type="",
    ) >= 10  # fmt: skip
    await users.dispose()


class Recorder:
    """Stands before a histogram and keeps what it is told."""

    def __init__(self, histogram: Any) -> None:
        self.seen: list[float] = []
        self._histogram = histogram

    def observe(self, value: float) -> None:
        self.seen.append(value)
        self._histogram.observe(value)

    def observe_none(self) -> None:
        self.seen.append(0.0)
        self._histogram.observe_none()


def percentiles(values: list[float]) -> tuple[float, float]:
    """Return p50 and p99."""
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg-async", "psycopg", "asyncmy"])
async def test_waits_under_contention_are_within_two_milliseconds(
    pool_probe: PoolProbe, writer: Writer, driver: str, url: str
) -> None:
    """With 24 users of 4 connections of a real server, p50 and p99 are within 2 ms of the users' own clocks."""
    users = Users(driver, url, pool_size=4, max_overflow=0, pool_timeout=30)
    await users.warm(4)
    pool_probe.sample()
    queue: Any = pool_probe._series["shop"].queue
    recorder = queue.wait = Recorder(queue.wait)
    chance = random.Random(7)

    async def user() -> list[float]:
        return [await users.use(chance.uniform(0.002, 0.02)) for _ in range(12)]

    for _ in range(6):  # until no thread was put aside between the two clocks
        recorder.seen.clear()
        truth = [waited for one in await asyncio.gather(*(user() for _ in range(24))) for waited in one]
        assert len(recorder.seen) == len(truth) == 288
        true, measured = percentiles(truth), percentiles(recorder.seen)
        print(f"{driver}: p50 true {true[0] * 1e3:.2f} measured {measured[0] * 1e3:.2f} ms, "
              f"p99 true {true[1] * 1e3:.2f} measured {measured[1] * 1e3:.2f} ms")  # fmt: skip
        if all(abs(a - b) < 0.002 for a, b in zip(true, measured, strict=True)):
            break
    assert true[0] > 0.02  # there was contention
    assert measured == pytest.approx(true, abs=0.002)
    await users.dispose()


@pytest.mark.parametrize("faults", [500, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "asyncmy"])
async def test_random_faults_leave_no_drift(
    pool_probe: PoolProbe, writer: Writer, driver: str, url: str, faults: int
) -> None:
    """After random cancellations, time-outs, errors, invalidations and refusals, the counts are the truth."""
    users = Users(driver, url, pool_size=3, max_overflow=2, pool_timeout=0.004)
    chance = random.Random(7)
    lock = threading.Lock()
    refuse = {"next": 0}

    @event.listens_for(getattr(users.engine, "sync_engine", users.engine), "do_connect")
    def _do_connect(*_: Any) -> None:
        with lock:
            refuse["next"] += 1
            if refuse["next"] % 7 == 0:
                raise OSError("refused")

    opened = {"connect": 0, "close": 0}
    for name in opened:
        event.listen(users.pool, name, lambda *_, name=name: opened.update({name: opened[name] + 1}))
    happened = 0
    while happened < faults:
        ends = chance.choices(["close", "fail", "invalidate"], [6, 2, 1], k=16)
        tasks = [asyncio.ensure_future(users.use(chance.random() * 0.004, end)) for end in ends]
        if users.is_async:
            await asyncio.sleep(chance.random() * 0.006)
            for task in chance.sample(tasks, 8):
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        happened += sum(isinstance(outcome, BaseException) for outcome in outcomes) + ends.count("invalidate")
    pool_probe.sample()
    assert writer.value("db_client_connection_pending_requests", **POOL) == 0
    assert writer.value("db_client_connection_timeouts_total", **POOL) > 0
    assert writer.value("headroom_pool_invalidations_total", **POOL) > 0
    assert count(writer, "used") == users.pool.checkedout() == 0
    assert count(writer, "idle") == opened["connect"] - opened["close"]
    await users.dispose()


async def test_a_recycled_connection_is_a_creation_and_no_fault(
    pool_probe: PoolProbe, writer: Writer, driver: str, url: str
) -> None:
    """A connection replaced for its age by pool_recycle counts as created and recycled, not as invalidated."""
    users = Users(driver, url, pool_size=1, max_overflow=0, pool_recycle=0)
    await users.use(0.01)
    made = writer.value("db_client_connection_create_time_seconds_count", **POOL)
    recycled = writer.value("headroom_pool_recycles_total", reason="age", **POOL)
    await users.use(0.01)
    assert writer.value("db_client_connection_create_time_seconds_count", **POOL) == made + 1
    assert writer.value("headroom_pool_recycles_total", reason="age", **POOL) == recycled + 1
    assert writer.value("headroom_pool_invalidations_total", **POOL) == 0
    await users.dispose()


async def test_what_a_pool_is_not_set_up_to_do_has_no_series(
    pool_probe: PoolProbe, writer: Writer, driver: str, url: str
) -> None:
    """Without pool_pre_ping and pool_recycle there are no counters of them; an overflow that is closed is neither."""
    users = Users(driver, url, pool_size=1, max_overflow=1)
    await asyncio.gather(users.use(0.05), users.use(0.05))
    await users.use(0.0, "invalidate")
    await users.use(0.0)
    assert writer.value("headroom_pool_invalidations_total", **POOL) == 1
    assert writer.value("db_client_connection_create_time_seconds_count", **POOL) == 3
    assert not [name for name, _ in writer.samples() if "ping_failures" in name or "recycles" in name]
    await users.dispose()


def test_an_assertion_pool_reports_use_and_no_limit(pool_probe: PoolProbe, writer: Writer, url: str) -> None:
    """AssertionPool, which allows one checkout, shows it, and a refused second one leaves nothing in use."""
    engine = create_engine(url, poolclass=AssertionPool, pool_logging_name="shop")
    with engine.connect():
        with pytest.raises(AssertionError):
            engine.connect()
        pool_probe.sample()
        assert count(writer, "used") == 1
    pool_probe.sample()
    assert count(writer, "used") == 0
    with pytest.raises(KeyError):
        writer.value("db_client_connection_max", **POOL)
    engine.dispose()


def test_an_error_during_checkout_leaves_nothing_in_use(pool_probe: PoolProbe, writer: Writer, url: str) -> None:
    """When the app's own checkout listener raises, the connection is not counted as held."""
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_logging_name="shop")

    @event.listens_for(engine, "checkout")
    def _checkout(*_: Any) -> None:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            engine.connect()
    pool: Any = engine.pool
    pool_probe.sample()
    assert count(writer, "used") == pool.checkedout() == 0
    assert count(writer, "idle") == 0  # SQLAlchemy closed the connection and kept its place
    engine.dispose()
