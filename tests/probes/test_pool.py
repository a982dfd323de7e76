"""The pool probe against real PostgreSQL: waits, holds, counts and blame equal the truth."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool, QueuePool, SingletonThreadPool, StaticPool
from sqlalchemy.util.queue import AsyncAdaptedQueue

from demo_app.stack.servers import Postgres
from fastapi_headroom import ledger
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.ledger import POOL_WAIT, Ledger
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.pool_hooks import _takes_at_once
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.tracing import spans
from tests.support.drivers import kill

pytestmark = pytest.mark.alone

POOL = "db_client_connection_pool_name"
HOLD = 0.1


@pytest.fixture
async def engine(postgres: Postgres) -> AsyncIterator[AsyncEngine]:
    """An async engine with two connections at most."""
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=2, max_overflow=0, pool_timeout=5, pool_logging_name="shop"
    )
    yield engine
    await engine.dispose()


def value(writer: Writer, name: str, pool: str = "shop", **labels: str) -> float:
    return writer.value(name, **{POOL: pool}, **labels)


def count(writer: Writer, state: str, pool: str = "shop") -> float:
    return value(writer, "db_client_connection_count", pool, db_client_connection_state=state)


def names(writer: Writer, sample: str) -> set[str]:
    return {dict(labels)[POOL] for name, labels in writer.samples() if name == sample}


async def warm(engine: AsyncEngine, connections: int = 2) -> None:
    """Open connections, so that none is made while something is timed."""
    opened = [await engine.connect() for _ in range(connections)]
    for connection in opened:
        await connection.close()


async def hold(engine: AsyncEngine, seconds: float = HOLD) -> None:
    async with engine.connect():
        await asyncio.sleep(seconds)


async def test_waits_of_an_async_pool_equal_the_truth(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """Six checkouts on two connections held 100 ms each wait 0 0 100 100 200 200 ms."""
    await warm(engine)
    before = value(writer, "db_client_connection_wait_time_seconds_sum")
    started = time.perf_counter()
    await asyncio.gather(*(hold(engine) for _ in range(6)))
    late = time.perf_counter() - started - 3 * HOLD
    waited = value(writer, "db_client_connection_wait_time_seconds_sum") - before
    assert waited == pytest.approx(6 * HOLD, abs=0.01 + 4 * late)
    assert value(writer, "db_client_connection_wait_time_seconds_count") == 2 + 6
    assert value(writer, "db_client_connection_wait_time_seconds_bucket", le="0.01") == 2 + 2
    assert value(writer, "db_client_connection_wait_time_seconds_bucket", le="0.05") == 2 + 2
    assert value(writer, "headroom_pool_wait_seconds_total", http_route="_outside") == pytest.approx(waited + before)


def test_waits_of_a_sync_pool_in_threads_equal_the_truth(
    pool_probe: PoolProbe, writer: Writer, postgres: Postgres
) -> None:
    """Six threads on two psycopg connections held 100 ms each wait 600 ms together."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=2, max_overflow=0, pool_logging_name="shop")
    first, second = engine.connect(), engine.connect()
    first.close(), second.close()
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        with engine.connect() as connection:
            connection.execute(text("select 1"))
            time.sleep(HOLD)

    started = time.perf_counter()
    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(work) for _ in range(6)]:
            done.result()
    late = time.perf_counter() - started - 3 * HOLD
    waited = value(writer, "db_client_connection_wait_time_seconds_sum")
    assert waited == pytest.approx(6 * HOLD, abs=0.01 + 4 * late)
    assert value(writer, "db_client_connection_use_time_seconds_count") == 8
    pool_probe.sample()
    assert (count(writer, "used"), count(writer, "idle")) == (0, 2)
    engine.dispose()


async def test_waiters_are_pending_until_they_get_one(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """The gauges show two used, none idle and three pending while the pool is exhausted, and the limits."""
    await warm(engine)
    let_go = asyncio.Event()

    async def hold_on() -> None:
        async with engine.connect():
            await let_go.wait()

    tasks = [asyncio.create_task(hold_on()) for _ in range(5)]
    async with asyncio.timeout(5):
        while pool_probe.sample() or value(writer, "db_client_connection_pending_requests") < 3:
            await asyncio.sleep(0.01)
    await asyncio.to_thread(pool_probe.sample)
    assert (count(writer, "used"), count(writer, "idle")) == (2, 0)
    assert value(writer, "db_client_connection_pending_requests") == 3
    assert value(writer, "db_client_connection_max") == 2
    assert value(writer, "db_client_connection_idle_max") == 2
    assert value(writer, "headroom_pool_overflow") == 0
    let_go.set()
    await asyncio.gather(*tasks)
    pool_probe.sample()
    assert (count(writer, "used"), count(writer, "idle")) == (0, 2)
    assert value(writer, "db_client_connection_pending_requests") == 0


async def test_exhausted_pool_counts_time_outs(pool_probe: PoolProbe, writer: Writer, postgres: Postgres) -> None:
    """A checkout that gives up after pool_timeout is one time-out, and its wait is in the histogram."""
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=1, max_overflow=0, pool_timeout=0.1, pool_logging_name="shop"
    )
    async with engine.connect():
        with pytest.raises(exc.TimeoutError):
            await engine.connect()
    assert value(writer, "db_client_connection_timeouts_total") == 1
    assert value(writer, "db_client_connection_wait_time_seconds_sum") >= 0.1
    pool_probe.sample()
    assert value(writer, "db_client_connection_pending_requests") == 0
    await engine.dispose()


async def test_making_a_connection_is_no_wait(pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine) -> None:
    """The first checkouts open connections: create time is recorded, and the wait stays near 0."""
    for number in range(1, 9):  # until no other process had the CPU in the midst of it
        before = value(writer, "db_client_connection_wait_time_seconds_sum") if number > 1 else 0.0
        made = value(writer, "db_client_connection_create_time_seconds_sum") if number > 1 else 0.0
        await warm(engine)
        assert value(writer, "db_client_connection_create_time_seconds_count") == 2 * number
        created = value(writer, "db_client_connection_create_time_seconds_sum") - made
        waited = value(writer, "db_client_connection_wait_time_seconds_sum") - before
        await engine.dispose()
        if waited < min(0.001, created / 2):
            break
    assert created > 0.002
    assert waited < min(0.001, created / 2)


async def test_cancelled_waiters_leave_no_drift(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine, postgres: Postgres
) -> None:
    """After 500 random cancellations nobody is pending, and used and idle equal what the pool and the server say."""
    chance = random.Random(7)

    async def use() -> None:
        async with engine.connect():
            await asyncio.sleep(chance.random() * 0.003)

    cancelled = 0
    for _ in range(50):
        tasks = [asyncio.create_task(use()) for _ in range(14)]
        await asyncio.sleep(chance.random() * 0.004)
        for task in chance.sample(tasks, 10):
            cancelled += task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert cancelled > 300
    pool: Any = engine.pool
    async with engine.connect() as connection:
        pool_probe.sample()
        assert value(writer, "db_client_connection_pending_requests") == 0
        assert count(writer, "used") == pool.checkedout() == 1
        assert count(writer, "idle") == pool.checkedin()
        mine = text("select count(*) from pg_stat_activity where backend_type = 'client backend'")
        async with asyncio.timeout(10):  # the server's processes take a moment to end
            while (await connection.execute(mine)).scalar_one() != count(writer, "used") + count(writer, "idle"):
                await asyncio.sleep(0.02)
    pool_probe.sample()
    assert count(writer, "used") == 0


async def test_routes_that_wait_and_hold_are_named(pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine) -> None:
    """Wait is charged to the victim's route, hold and held-but-idle to the culprit's, and the ledger gets the wait."""
    await warm(engine)

    truth = {"waited": 0.0, "held": 0.0, "idle": 0.0}  # of /victim, /slow and /slow: a busy machine stretches sleeps

    async def request(route: str, seconds: float, sql: str = "select 1") -> Ledger:
        books = Ledger("GET")
        ledger.current.set(books)
        asked = time.perf_counter()
        async with engine.connect() as connection:
            got = time.perf_counter()
            books.route = route  # the router may match after a middleware has checked out
            await connection.execute(text(sql))
            idle = time.perf_counter()
            await asyncio.sleep(seconds)
        end = time.perf_counter()
        books.finish(end)
        if route == "/victim":
            truth["waited"] = got - asked
        else:
            truth["held"] += end - got
            truth["idle"] += end - idle
        return books

    culprits = [asyncio.create_task(request("/slow", 0.1, "select pg_sleep(0.1)")) for _ in range(2)]
    while engine.pool.checkedout() < 2:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    books = await asyncio.create_task(request("/victim", 0.0))
    await asyncio.gather(*culprits)
    held = value(writer, "headroom_pool_hold_seconds_total", http_route="/slow")
    idle = value(writer, "headroom_pool_idle_hold_seconds_total", http_route="/slow")
    assert truth["held"] > 0.39 and truth["idle"] > 0.19
    assert held == pytest.approx(truth["held"], abs=0.05)
    assert idle == pytest.approx(truth["idle"], abs=0.05)
    waited = value(writer, "headroom_pool_wait_seconds_total", http_route="_unmatched")
    assert waited == pytest.approx(truth["waited"], abs=0.04)
    assert books.seconds[POOL_WAIT] == pytest.approx(truth["waited"], abs=0.04)
    assert waited > 0.1
    assert books.waits == []
    assert books.queries == 1


async def test_engines_made_before_and_after_are_found(writer: Writer, postgres: Postgres) -> None:
    """Sync and async engines made before or after bind are measured, named by their URL without credentials."""
    before = create_async_engine(postgres.url(driver="asyncpg"))
    async with before.connect():
        pass
    probe = PoolProbe(load({}))
    probe.bind(writer)
    after = create_engine(postgres.url(driver="psycopg", database="template1"))
    async with before.connect():
        probe.sample()
        assert count(writer, "used", f"postgres@127.0.0.1:{postgres.port}") == 1
    with after.connect():
        probe.sample()
        assert count(writer, "used", f"template1@127.0.0.1:{postgres.port}") == 1
    assert names(writer, "db_client_connection_max") == {
        f"postgres@127.0.0.1:{postgres.port}",
        f"template1@127.0.0.1:{postgres.port}",
    }
    await before.dispose()
    after.dispose()
    probe.close()


async def test_named_pools_have_series_from_the_start(writer: Writer, engine: AsyncEngine) -> None:
    """A pool that the user named shows its limit before its first checkout."""
    probe = PoolProbe(load({}), names={"primary": engine})
    probe.bind(writer)
    probe.sample()
    assert value(writer, "db_client_connection_max", "primary") == 2
    assert count(writer, "idle", "primary") == 0
    probe.close()


async def test_names_given_later_and_to_the_wrong_thing(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """A name given after the first checkouts counts from then on; what is no engine is refused with the remedy."""
    await warm(engine)
    pool_probe.name_engines({"primary": engine})
    async with engine.connect():
        pool_probe.sample()
        assert (count(writer, "used", "primary"), count(writer, "used")) == (1, 0)
    assert value(writer, "db_client_connection_wait_time_seconds_count", "primary") == 1
    with pytest.raises(SettingsError, match="create_engine"):
        pool_probe.name_engines({"primary": "postgresql://localhost"})


async def test_dispose_and_recreation(pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine) -> None:
    """The pool that dispose() makes is measured at once, and what is still out of the old one stays counted."""
    await warm(engine)
    survivor = await engine.connect()
    await engine.dispose(close=False)
    pool_probe.sample()
    assert (count(writer, "used"), count(writer, "idle")) == (1, 0)
    assert value(writer, "db_client_connection_max") == 2
    async with engine.connect():
        pool_probe.sample()
        assert count(writer, "used") == 2
    await survivor.close()
    pool_probe.sample()
    assert count(writer, "used") == 0


async def test_overflow_and_detached_connections(pool_probe: PoolProbe, writer: Writer, postgres: Postgres) -> None:
    """Overflow counts beyond the size, and a detached connection is no longer held though it fires no checkin."""
    url = postgres.url(driver="asyncpg")
    engine = create_async_engine(url, pool_size=1, max_overflow=2, pool_logging_name="shop")
    first, second = await engine.connect(), await engine.connect()
    pool_probe.sample()
    assert value(writer, "headroom_pool_overflow") == 1
    assert value(writer, "db_client_connection_max") == 3
    raw = await second.get_raw_connection()
    raw.detach()
    pool_probe.sample()
    assert count(writer, "used") == 1
    assert value(writer, "db_client_connection_use_time_seconds_count") == 1
    await second.close()
    await first.close()
    pool_probe.sample()
    assert count(writer, "used") == 0
    assert value(writer, "db_client_connection_use_time_seconds_count") == 2
    await engine.dispose()


async def test_broken_connections_are_counted(pool_probe: PoolProbe, writer: Writer, postgres: Postgres) -> None:
    """A connection that fails its pre-ping is an invalidation and a ping failure; what was open beside it is replaced.

    SQLAlchemy takes one broken connection for a server that was restarted, and replaces all at their next checkout.
    """
    url = postgres.url(driver="asyncpg")
    engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_pre_ping=True, pool_logging_name="shop")
    async with engine.connect() as connection, engine.connect():
        broken = (await connection.get_raw_connection()).driver_connection
    assert value(writer, "headroom_pool_ping_failures_total") == 0
    await kill(postgres, broken.get_server_pid(), broken)
    for _ in range(2):
        async with engine.connect() as first, engine.connect() as second:
            for connection in (first, second):
                assert (await connection.execute(text("select 1"))).scalar_one() == 1
    assert value(writer, "headroom_pool_invalidations_total") == 1
    assert value(writer, "headroom_pool_ping_failures_total") == 1
    assert value(writer, "headroom_pool_recycles_total", reason="invalidated") == 1
    assert value(writer, "db_client_connection_create_time_seconds_count") == 4
    await engine.dispose()


async def test_pools_without_a_limit_claim_none(pool_probe: PoolProbe, writer: Writer) -> None:
    """NullPool, StaticPool and SingletonThreadPool report use but neither limit nor wait nor idle."""
    null = create_async_engine("sqlite+aiosqlite://", poolclass=NullPool, pool_logging_name="null")
    async with null.connect() as connection:
        await connection.execute(text("select 1"))
        pool_probe.sample()
        assert count(writer, "used", "null") == 1
    static = create_engine("sqlite://", poolclass=StaticPool, pool_logging_name="static")
    with static.connect(), static.connect():
        pool_probe.sample()
        assert count(writer, "used", "static") == 1
    single = create_engine("sqlite://", poolclass=SingletonThreadPool, pool_logging_name="single")
    with single.connect(), single.connect():
        pool_probe.sample()
        assert count(writer, "used", "single") == 1
    pool_probe.sample()
    for name in ("null", "static", "single"):
        assert count(writer, "used", name) == 0
        assert value(writer, "db_client_connection_use_time_seconds_count", name) >= 1
    for sample in ("db_client_connection_max", "db_client_connection_idle_max", "headroom_pool_overflow"):
        assert names(writer, sample) == set()
    assert names(writer, "db_client_connection_wait_time_seconds_count") == set()


async def test_connections_that_are_never_closed_come_back(
    pool_probe: PoolProbe, writer: Writer, postgres: Postgres
) -> None:
    """A connection dropped without close() ends its hold when the garbage collector finds it."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=1, max_overflow=0, pool_logging_name="shop")
    engine.raw_connection()
    pool_probe.sample()
    assert (count(writer, "used"), count(writer, "idle")) == (0, 1)
    engine.dispose()


async def test_async_connections_that_are_never_closed_leave_no_drift(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """An async connection that the garbage collector finds is no longer held, though it fires no checkin."""
    await warm(engine)

    async def leak() -> None:
        await engine.connect()

    with pytest.warns(exc.SAWarning, match="garbage collector"):
        await leak()
        gc.collect()
    pool_probe.sample()
    pool: Any = engine.pool
    assert count(writer, "used") == pool.checkedout() == 0
    assert value(writer, "db_client_connection_use_time_seconds_count") == 3


def test_a_lost_race_for_a_connection_counts_once(pool_probe: PoolProbe, writer: Writer) -> None:
    """When another thread takes the connection and the pool asks again, that is still one checkout and one wait."""

    def checkout(engine: Engine, books: Ledger) -> None:
        ledger.current.set(books)
        engine.connect().close()

    class Racing(QueuePool):
        lost = False

        def _inc_overflow(self) -> bool:
            if not self.lost:
                self.lost = True
                return False
            return super()._inc_overflow()

    engine = create_engine("sqlite://", poolclass=Racing, pool_size=1, max_overflow=0, pool_logging_name="shop")
    books = Ledger("GET")
    contextvars.copy_context().run(checkout, engine, books)
    pool: Any = engine.pool
    assert pool.lost
    assert books.waits == []
    pool_probe.sample()
    assert value(writer, "db_client_connection_wait_time_seconds_count") == 1
    assert value(writer, "db_client_connection_pending_requests") == 0


async def test_a_wait_is_a_span(pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine) -> None:
    """While traces are recorded, a real wait is a span with its times and the pool's name; no wait is none."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans.activate(provider)
    try:
        await warm(engine)
        with provider.get_tracer("test").start_as_current_span("request") as request:
            began = time.perf_counter()
            await asyncio.gather(*(hold(engine) for _ in range(3)))
            late = time.perf_counter() - began - 2 * HOLD
    finally:
        spans.deactivate()
    waits = [span for span in exporter.get_finished_spans() if span.name == "pool wait" and span.parent]
    waits = [span for span in waits if span.parent and span.parent.span_id == request.get_span_context().span_id]
    assert len(waits) == 1
    assert dict(waits[0].attributes or {}) == {"db.client.connection.pool.name": "shop"}
    assert waits[0].start_time is not None and waits[0].end_time is not None
    assert (waits[0].end_time - waits[0].start_time) / 1e9 == pytest.approx(HOLD, abs=0.03 + late)
    assert waits[0].end_time / 1e9 == pytest.approx(time.time(), abs=5)


def test_close_puts_everything_back(writer: Writer, postgres: Postgres) -> None:
    """After close() the classes, pools and connections are as they were, and nothing is counted any more."""
    before = (Pool.connect, QueuePool._do_get)
    probe = PoolProbe(load({}))
    probe.bind(writer)
    engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
    connection: Any = engine.connect()
    record: Any = connection.connection._connection_record
    probe.close()
    probe.close()
    assert (Pool.connect, QueuePool._do_get) == before
    assert record.record_info == {}
    assert not [key for key in vars(engine.pool) if "headroom" in key]
    checkouts = value(writer, "db_client_connection_wait_time_seconds_count")
    connection.close()
    engine.connect().close()
    assert value(writer, "db_client_connection_wait_time_seconds_count") == checkouts
    engine.dispose()


async def test_a_failing_hook_does_not_reach_the_app(
    writer: Writer, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the probe itself fails, checkouts go on and the failure is counted."""
    probe = PoolProbe(load({}))
    probe.bind(writer)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken probe")

    await warm(engine)
    monkeypatch.setattr("fastapi_headroom.probes.pool_hooks.Hold", broken)
    monkeypatch.setattr("fastapi_headroom.probes.statements.Statements._remember", broken)
    async with engine.connect() as connection:
        assert (await connection.execute(text("select 1"))).scalar_one() == 1
    assert writer.value("headroom_probe_up", probe="pool") == 0
    assert writer.value("headroom_probe_errors_total", probe="pool") >= 2
    probe.close()


async def test_rebinding_writes_to_the_new_writer_once(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """After a second bind, as a forked worker does it, every checkout counts once and in the new writer."""
    await warm(engine)
    fresh = Writer.in_memory()
    pool_probe.bind(fresh)
    async with engine.connect() as connection:
        await connection.execute(text("select 1"))
    assert value(fresh, "db_client_connection_wait_time_seconds_count") == 1
    assert value(writer, "db_client_connection_wait_time_seconds_count") == 2


async def test_an_idle_connection_is_no_wait_and_the_next_one_is(
    pool_probe: PoolProbe, writer: Writer, engine: AsyncEngine
) -> None:
    """A checkout that finds an idle connection waits 0 seconds; one that finds none has a wait in its ledger."""
    await warm(engine)
    before = value(writer, "db_client_connection_wait_time_seconds_sum")
    books = Ledger("GET")
    ledger.current.set(books)
    for _ in range(3):
        await hold(engine, 0)
    assert value(writer, "db_client_connection_wait_time_seconds_sum") == before
    assert value(writer, "db_client_connection_wait_time_seconds_count") == 2 + 3
    await asyncio.gather(*(hold(engine) for _ in range(3)))
    assert value(writer, "db_client_connection_wait_time_seconds_sum") - before >= HOLD * 0.9
    assert books.waits == []
    assert books.seconds[POOL_WAIT] >= HOLD * 0.9


def test_whether_a_pool_gives_at_once_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SQLAlchemy whose pool awaits even for what lies ready is recognised; there every checkout is a wait."""
    assert _takes_at_once()
    monkeypatch.setattr(AsyncAdaptedQueue, "get", lambda self, block, timeout: self._queue.get())
    assert not _takes_at_once()
