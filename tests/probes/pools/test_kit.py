"""What every library's pool must pass: waits, counts, time-outs, cancellations, names and clean ends."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from demo_app.stack.servers import Postgres, Redis
from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE, HTTP_CLIENT, POOL_WAIT, Ledger
from fastapi_headroom.probes.pools.probe import OtherPoolsProbe
from fastapi_headroom.probes.pools.series import MeterSeries
from fastapi_headroom.store.writer import Writer
from tests.probes.pools import libraries
from tests.probes.pools.libraries import Library

pytestmark = pytest.mark.alone

POOL = "db_client_connection_pool_name"
WAIT = "db_client_connection_wait_time_seconds"
HOLD = 0.1


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The address of a page."""
    with libraries.serving() as address:
        yield address


@pytest.fixture(params=libraries.ALL, ids=lambda library: library.__name__)
def library(request: pytest.FixtureRequest, postgres: Postgres, redis_server: Redis, service: str) -> Library:
    """One kind of pool after the other."""
    kind: type[Library] = request.param
    return kind(postgres, redis_server, service)


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def probe(writer: Writer) -> Iterator[OtherPoolsProbe]:
    probe = OtherPoolsProbe()
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


def value(writer: Writer, library: Library, name: str, **labels: str) -> float:
    return writer.value(name, **{POOL: library.name}, **labels)


def counts(writer: Writer, library: Library) -> tuple[float, float]:
    """Used and idle connections."""
    row = "db_client_connection_count"
    used = value(writer, library, row, db_client_connection_state="used")
    return used, value(writer, library, row, db_client_connection_state="idle")


async def warm(library: Library, pool: Any, connections: int = 2) -> None:
    """Open connections, so that none is made while something is timed."""
    await asyncio.gather(*(library.hold(pool, 0.05) for _ in range(connections)))


async def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_waits_equal_the_truth(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """Six users of two connections held 100 ms each wait 0 0 t t 2t 2t, and the metric says what their clocks say."""
    pool = await library.open()
    await warm(library, pool)
    for _ in range(8):  # until the machine let them run side by side
        before = value(writer, library, f"{WAIT}_sum")
        seen = value(writer, library, f"{WAIT}_count")
        short = value(writer, library, f"{WAIT}_bucket", le="0.05")
        truth = sorted(await asyncio.gather(*(library.hold(pool, HOLD) for _ in range(6))))
        measured = value(writer, library, f"{WAIT}_sum") - before
        assert value(writer, library, f"{WAIT}_count") - seen == 6
        disturbed = not all(
            abs(waited - expected) < 0.3 * HOLD
            for waited, expected in zip(truth, (0, 0, HOLD, HOLD, 2 * HOLD, 2 * HOLD), strict=True)
        )
        if not disturbed:
            break
    assert not disturbed, truth
    assert value(writer, library, f"{WAIT}_bucket", le="0.05") - short == 2
    assert sum(truth) - 6 * library.overhead < measured <= sum(truth) + 0.002
    blamed = value(writer, library, "headroom_pool_wait_seconds_total", http_route="_outside")
    assert blamed == pytest.approx(value(writer, library, f"{WAIT}_sum"), abs=0.001)
    used = value(writer, library, "db_client_connection_use_time_seconds_sum")
    assert used >= 6 * HOLD
    assert value(writer, library, "headroom_pool_hold_seconds_total", http_route="_outside") == pytest.approx(used)
    await library.close(pool)


async def test_counts_while_exhausted_and_after(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """Two used, none idle and three pending of two while the pool is exhausted; two idle when all came back."""
    pool = await library.open()
    await warm(library, pool)
    tasks = [asyncio.ensure_future(library.hold(pool, 0.4)) for _ in range(5)]

    def exhausted() -> bool:
        probe.sample()
        return value(writer, library, "db_client_connection_pending_requests") == 3

    await until(exhausted)
    assert counts(writer, library) == (2, 0)
    assert value(writer, library, "db_client_connection_max") == 2
    await asyncio.gather(*tasks)
    probe.sample()
    assert counts(writer, library) == (0, 2)
    assert value(writer, library, "db_client_connection_pending_requests") == 0
    await library.close(pool)


async def test_time_outs_are_counted(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """A checkout that gives up is one time-out, its wait counts, and nobody is pending afterwards."""
    pool = await library.open(size=1, timeout=0.5)  # asyncpg's covers connecting, too
    await warm(library, pool, 1)
    holder = asyncio.ensure_future(library.hold(pool, 1.5))

    def taken() -> bool:
        probe.sample()
        return counts(writer, library) == (1, 0)

    await until(taken)
    before, began = value(writer, library, f"{WAIT}_sum"), time.perf_counter()
    with pytest.raises(library.gave_up):
        await library.hold(pool, 0)
    took = time.perf_counter() - began
    assert value(writer, library, "db_client_connection_timeouts_total") == 1
    assert 0.49 <= value(writer, library, f"{WAIT}_sum") - before <= took
    await holder
    probe.sample()
    assert counts(writer, library) == (0, 1)
    assert value(writer, library, "db_client_connection_pending_requests") == 0
    await library.close(pool)


async def test_a_wait_is_pool_wait_in_the_ledger(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """The request's ledger has the whole wait as pool_wait, also where another stage was open around it."""
    stage = {"redis": CACHE, "httpx": HTTP_CLIENT}.get(library.label)
    pool = await library.open(size=1)
    await warm(library, pool, 1)
    holder = asyncio.ensure_future(library.hold(pool, 0.4))

    def taken() -> bool:
        probe.sample()
        return counts(writer, library) == (1, 0)

    await until(taken)
    books = Ledger("GET")
    books.route = "/victim"
    ledger.current.set(books)
    if stage is not None:
        books.enter(stage)
    waited = await library.hold(pool, 0)
    if stage is not None:
        books.leave(stage)
    assert books.waits == []
    assert waited > 0.1
    assert books.seconds[POOL_WAIT] == pytest.approx(waited, abs=0.02)
    assert value(writer, library, "headroom_pool_wait_seconds_total", http_route="/victim") == pytest.approx(
        books.seconds[POOL_WAIT], abs=0.002
    )
    await holder
    await library.close(pool)


@pytest.mark.parametrize("rounds", [36, pytest.param(720, marks=pytest.mark.soak)])
async def test_faults_leave_no_drift(probe: OtherPoolsProbe, writer: Writer, library: Library, rounds: int) -> None:
    """After 500 checkouts (soak: 10,000), cancelled, failed and timed out at random, the counts equal the truth."""
    chance = random.Random(7)
    pool = await library.open(timeout=0.004)
    books = Ledger("GET")
    ledger.current.set(books)
    faults = 0
    for _ in range(rounds):
        tasks = [
            asyncio.ensure_future(library.hold(pool, chance.random() * 0.003, fail=chance.random() < 0.3))
            for _ in range(14)
        ]
        if library.cancels:
            await asyncio.sleep(chance.random() * 0.004)
            for task in chance.sample(tasks, 8):
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        faults += sum(isinstance(outcome, BaseException) for outcome in outcomes)
    assert faults > rounds * 14 * 0.2

    def settled() -> bool:
        probe.sample()
        truth = library.truth(pool)
        used, idle = counts(writer, library)
        return (used == 0 or library.loses) and (truth is None or used + idle == truth)

    await until(settled)
    assert value(writer, library, "db_client_connection_pending_requests") == 0
    assert books.waits == []
    assert not [meter for each in probe._libraries for meter in each.meters._by_id.values() if meter.holds]
    await library.close(pool)


async def test_close_and_recreation(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """A closed pool has no connections; one made in its place is measured at once, under the same name."""
    pool = await library.open(size=1)
    await library.hold(pool, 0)
    await library.close(pool)
    probe.sample()
    assert counts(writer, library) == (0, 0)
    again = await library.open(size=2)
    await warm(library, again)
    probe.sample()
    assert counts(writer, library) == (0, 2)
    await library.close(again)


async def test_names_hold_no_credentials(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """A pool is named by its address without user and password, or as the user says."""
    pool = await library.open()
    await library.hold(pool, 0)
    names = {dict(labels)[POOL] for _, labels in writer.samples() if POOL in dict(labels)}
    assert names == {library.name}
    assert probe.name_pools({"mine": pool, "other": "engine"}) == {"other": "engine"}
    await library.hold(pool, 0)
    probe.sample()
    assert writer.value("db_client_connection_max", **{POOL: "mine"}) == 2
    assert "hunter2" not in str(writer.samples())
    await library.close(pool)


async def test_a_library_imported_later_is_found(
    writer: Writer, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that the app imports after init is measured from the next sample on."""
    module = sys.modules[library.module]
    monkeypatch.delitem(sys.modules, library.module)
    probe = OtherPoolsProbe()
    probe.bind(writer)
    monkeypatch.setitem(sys.modules, library.module, module)
    pool = await library.open()
    await library.hold(pool, 0)
    assert not [name for name, _ in writer.samples() if name == f"{WAIT}_count"]
    probe.sample()
    await library.hold(pool, 0)
    assert value(writer, library, f"{WAIT}_count") == 1
    await library.close(pool)
    probe.close()


def _attributes(library: Library) -> dict[str, Any]:
    """Everything that the library's classes define."""
    package = library.module.partition(".")[0]
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for cls in [item for item in vars(module).values() if isinstance(item, type)]:
                found |= {f"{cls.__module__}.{cls.__qualname__}.{key}": item for key, item in vars(cls).items()}
    return found


async def test_close_puts_the_library_back(writer: Writer, library: Library) -> None:
    """After close() every class is as it was, a wait that was under way ends well, and nothing is counted."""
    before = _attributes(library)
    probe = OtherPoolsProbe()
    probe.bind(writer)
    assert _attributes(library) != before
    pool = await library.open(size=1)
    await library.hold(pool, 0)
    tasks = [asyncio.ensure_future(library.hold(pool, 0.05)) for _ in range(3)]
    await asyncio.sleep(0.02)
    probe.close()
    probe.close()
    after = _attributes(library)
    assert {key for key in before if before[key] is not after[key] and callable(before[key])} == set()
    await asyncio.gather(*tasks)
    seen = value(writer, library, "db_client_connection_use_time_seconds_count")
    await library.hold(pool, 0)
    assert value(writer, library, "db_client_connection_use_time_seconds_count") == seen
    await library.close(pool)


async def test_rebinding_counts_once(probe: OtherPoolsProbe, writer: Writer, library: Library) -> None:
    """After a second bind, as a forked worker does it, a checkout counts once, and in the new writer."""
    pool = await library.open()
    await library.hold(pool, 0)
    fresh = Writer.in_memory()
    probe.bind(fresh)
    await library.hold(pool, 0)
    assert value(fresh, library, f"{WAIT}_count") == 1
    assert value(writer, library, f"{WAIT}_count") == 1
    assert value(fresh, library, "db_client_connection_use_time_seconds_count") == 1
    await library.close(pool)


async def test_a_failing_probe_does_not_reach_the_app(
    writer: Writer, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing a wait or a hold fails, checkouts go on and the failure is counted."""
    probe = OtherPoolsProbe()
    probe.bind(writer)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken probe")

    monkeypatch.setattr(MeterSeries, "route", broken)
    pool = await library.open(size=1)
    await asyncio.gather(*(library.hold(pool, 0.01) for _ in range(3)))
    assert writer.value("headroom_probe_up", probe="pool") == 0
    assert writer.value("headroom_probe_errors_total", probe="pool") >= 3
    await library.close(pool)
    probe.close()
