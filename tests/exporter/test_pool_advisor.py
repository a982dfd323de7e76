"""The exporter's advice on pools: from each worker's own counters to rows of a scrape."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from demo_app.stack.servers import Postgres
from fastapi_headroom import catalog
from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.pool_advisor import PoolAdvisor
from fastapi_headroom.exporter.pool_rows import HISTOGRAMS, PoolReader
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.advice.simulated import Checkout, poisson, run, smallest_size, take
from tests.exporter.test_collect import values

SECONDS = 60.0
RECOMMENDED = "headroom_pool_recommended_size"


def traffic(rate: float, hold: float = 0.05) -> list[Checkout]:
    """Return a minute of chance arrivals."""
    rng = random.Random(rate)
    return take(poisson(rate, rng), lambda: rng.expovariate(1 / hold), SECONDS)


def live(
    writer: Writer, checkouts: list[Checkout], size: int = 30, pool: str = "primary", *, limited: bool = True
) -> None:
    """Write what a worker with a pool of this size would have."""
    use, wait, demand = (
        writer.histogram(metric, pool) for metric in (catalog.POOL_USE, catalog.POOL_WAIT, catalog.POOL_DEMAND)
    )
    if limited:
        writer.gauge(catalog.POOL_MAX, pool).set(size)
    for (_, hold), waited, found in zip(checkouts, *run(checkouts, size), strict=True):
        use.observe(hold)
        wait.observe(waited)
        demand.observe(found)


class Clock:
    """A clock that stands until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def said(advisor: PoolAdvisor) -> dict[tuple[str, ...], float]:
    """Return the advice; how many workers have a pool is known at once and is no advice."""
    rows = advisor.rows()
    return {(metric.name, *labels): value for metric, labels, value in rows if metric is not catalog.POOL_WORKERS}


def watch(advisor: PoolAdvisor, clock: Clock, *workers: tuple[Writer, list[Checkout]]) -> dict[tuple[str, ...], float]:
    """Look, let a minute of traffic pass, and look again."""
    for writer, _ in workers:
        live(writer, [])
    advisor.look()
    for writer, checkouts in workers:
        live(writer, checkouts)
    clock.now += SECONDS
    advisor.look()
    return said(advisor)


def test_the_worker_that_needs_most_sizes_the_pool_of_all(tmp_path: Path, clock: Clock) -> None:
    """Two workers with one and two thirds of the traffic: the size is the busier one's, not that of the sum or mean."""
    quiet, busy = traffic(40), traffic(120)
    rows = watch(
        PoolAdvisor(tmp_path, clock=clock), clock, (Writer.open(tmp_path), quiet), (Writer.open(tmp_path), busy)
    )
    best = smallest_size(busy, 0.01)
    assert smallest_size(quiet, 0.01) < best - 1
    assert abs(rows[RECOMMENDED, "primary"] - best) <= 1
    peak = max(run(busy, 30)[1]) + 1
    assert peak <= rows["headroom_pool_peak_connections", "primary"] <= 1.25 * peak
    waits = {labels[2]: wait for labels, wait in rows.items() if labels[0] == "headroom_pool_predicted_wait_seconds"}
    assert waits["1x"] <= 0.01 < waits["0.75x"]
    assert waits["actual"] == 0.0


def test_nothing_is_said_before_there_is_enough_to_tell(tmp_path: Path, clock: Clock) -> None:
    """Less than a minute, or fewer than 200 checkouts of a worker: no rows, rather than 0 or a guess."""
    writer = Writer.open(tmp_path)
    advisor = PoolAdvisor(tmp_path, clock=clock)
    assert watch(advisor, clock, (writer, traffic(40)[:199])) == {}
    live(writer, traffic(40)[:1])
    advisor.look()
    assert (RECOMMENDED, "primary") in said(advisor)
    hasty = PoolAdvisor(tmp_path, clock=clock)
    hasty.look()
    live(writer, traffic(40))
    clock.now += SECONDS - 1
    hasty.look()
    assert said(hasty) == {}


def test_what_was_counted_before_the_exporter_came_is_left_out(tmp_path: Path, clock: Clock) -> None:
    """Counters outlive exporters: yesterday's rush does not size today's pool."""
    writer = Writer.open(tmp_path)
    live(writer, traffic(300))
    rows = watch(PoolAdvisor(tmp_path, clock=clock), clock, (writer, traffic(40)))
    assert abs(rows[RECOMMENDED, "primary"] - smallest_size(traffic(40), 0.01)) <= 1


def test_the_database_s_limit_is_shared_by_the_workers(tmp_path: Path, clock: Clock) -> None:
    """With 10 connections for two workers 5 each are recommended, and the predicted wait tells the price."""
    workers = [Writer.open(tmp_path) for _ in range(2)]
    for writer in workers:
        writer.gauge(catalog.DATABASE_CONNECTIONS_MAX, "primary").set(10)
    rows = watch(PoolAdvisor(tmp_path, clock=clock), clock, (workers[0], traffic(80)), (workers[1], traffic(80)))
    assert rows[RECOMMENDED, "primary"] == 5
    assert rows["headroom_pool_predicted_wait_seconds", "primary", "1x"] > 0.01


def test_a_worker_that_is_gone_is_not_asked(tmp_path: Path, clock: Clock) -> None:
    """Once the scrape has seen that a worker died, the others alone are sized and share the limit."""
    stays, goes = Writer.open(tmp_path), Writer.open(tmp_path)
    stays.gauge(catalog.DATABASE_CONNECTIONS_MAX, "primary").set(8)
    advisor = PoolAdvisor(tmp_path, clock=clock)
    assert watch(advisor, clock, (stays, traffic(80)), (goes, traffic(200)))[RECOMMENDED, "primary"] == 4
    goes.close()
    collector = Collector(Reader(tmp_path), pools=advisor)
    collector.collect()
    advisor.look()
    assert values(collector.collect())[f"{RECOMMENDED} primary"] == min(8, smallest_size(traffic(80), 0.01))


def test_a_pool_without_limit_is_told_which_one_it_needs(tmp_path: Path, clock: Clock) -> None:
    """max_overflow=-1: no limit to compare with, and the same advice; no prediction for an actual size."""
    writer, advisor = Writer.open(tmp_path), PoolAdvisor(tmp_path, clock=clock)
    live(writer, [], limited=False)
    advisor.look()
    live(writer, traffic(80), 1000, limited=False)
    clock.now += SECONDS
    advisor.look()
    assert abs(said(advisor)[RECOMMENDED, "primary"] - smallest_size(traffic(80), 0.01)) <= 1
    assert ("headroom_pool_predicted_wait_seconds", "primary", "actual") not in said(advisor)


def test_pools_beyond_the_cap_on_names_are_not_sized_together(tmp_path: Path, clock: Clock) -> None:
    """`_OTHER` is many pools: their sum is the size of none of them. Pools with names are sized each by itself."""
    writer = Writer.open(tmp_path)
    for pool in ("a", "b", "_OTHER"):
        live(writer, [], pool=pool)
    advisor = PoolAdvisor(tmp_path, clock=clock)
    advisor.look()
    live(writer, traffic(40), pool="a")
    live(writer, traffic(120), pool="b")
    live(writer, traffic(120), pool="_OTHER")
    clock.now += SECONDS
    advisor.look()
    sizes = {labels[1]: value for labels, value in said(advisor).items() if labels[0] == RECOMMENDED}
    assert sizes.keys() == {"a", "b"} and sizes["a"] < sizes["b"]


def test_counters_that_went_back_give_no_advice(tmp_path: Path, clock: Clock) -> None:
    """A store that was emptied starts anew: no negative rates, no advice, no error."""
    writer = Writer.open(tmp_path)
    live(writer, traffic(120))
    advisor = PoolAdvisor(tmp_path, clock=clock)
    advisor.look()
    writer.close()
    for path in tmp_path.iterdir():
        path.unlink()
    live(Writer.open(tmp_path), traffic(40)[:500])
    clock.now += SECONDS
    advisor.look()
    assert said(advisor) == {}


def test_a_worker_s_rows_are_what_it_wrote(tmp_path: Path) -> None:
    """Sums, counts and gauges of each slot by itself, also of series that come later; torn files are left out."""
    first, second = Writer.open(tmp_path), Writer.open(tmp_path)
    reader = PoolReader(tmp_path)
    assert reader.read() == {}
    live(first, traffic(10)[:7], size=3)
    assert reader.read()[0, "primary"].gauges == {catalog.POOL_MAX: 3.0}
    live(second, traffic(10)[:5], size=4)
    live(second, traffic(10)[:2], size=5, pool="replica")
    rows = reader.read()
    assert rows.keys() == {(0, "primary"), (1, "primary"), (1, "replica")}
    for place, writer in (((0, "primary"), first), ((1, "primary"), second), ((1, "replica"), second)):
        labels = {"db_client_connection_pool_name": place[1]}
        for metric in (catalog.POOL_USE, catalog.POOL_WAIT, catalog.POOL_DEMAND):
            read = rows[place].since(None, metric)
            assert read.count == writer.value(f"{metric.name}_count", **labels)
            assert read.total == writer.value(f"{metric.name}_sum", **labels)
            for bound in (metric.buckets[0], metric.buckets[4]):
                text = f"{bound:.1f}" if bound >= 0.1 or bound == 0 else f"{bound:g}"
                at_most = sum(
                    count for limit, count in zip(metric.buckets, read.counts, strict=False) if limit <= bound
                )
                assert at_most == writer.value(f"{metric.name}_bucket", **labels, le=text)
    (tmp_path / "histogram_slot0.db").write_bytes(b"\xff" * 64)
    assert (1, "primary") in reader.read()


def test_the_exporter_carries_it_out(tmp_path: Path, clock: Clock) -> None:
    """A scrape has the advice as gauges beside the merged rows of the workers."""
    writer = Writer.open(tmp_path)
    advisor = PoolAdvisor(tmp_path, clock=clock)
    rows = watch(advisor, clock, (writer, traffic(80)))
    seen = values(Collector(Reader(tmp_path), pools=advisor).collect())
    assert seen[f"{RECOMMENDED} primary"] == rows[RECOMMENDED, "primary"]
    assert seen["headroom_pool_predicted_wait_seconds primary 0.75x"] > 0.01
    assert seen["headroom_pool_workers primary"] == 1.0


async def test_a_real_pool_that_is_too_small_is_told_what_it_needs(tmp_path: Path, postgres: Postgres) -> None:
    """Four callers on a pool of one connection to a real PostgreSQL: what the probe wrote asks for about four."""
    probe = PoolProbe(load({}))
    probe.bind(Writer.open(tmp_path))
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=1, max_overflow=0, pool_timeout=60, pool_logging_name="primary"
    )

    async def caller(times: int) -> None:
        for _ in range(times):
            async with engine.connect():
                await asyncio.sleep(0.02)

    advisor = PoolAdvisor(tmp_path, least_seconds=0.1, least_checkouts=50)
    await caller(1)
    probe.sample()
    advisor.look()
    await asyncio.gather(*(caller(30) for _ in range(4)))
    probe.sample()
    advisor.look()
    await engine.dispose()
    probe.close()
    rows = {(metric.name, *labels): value for metric, labels, value in advisor.rows()}
    assert 3 <= rows[RECOMMENDED, "primary"] <= 5
    assert rows["headroom_pool_peak_connections", "primary"] == 4


def test_a_worker_of_another_release_spoils_no_advice(tmp_path: Path, clock: Clock) -> None:
    """Histograms with other buckets or labels, as during a rolling update, are left out, and the others are sized."""
    other = Writer.open(tmp_path)
    for metric in HISTOGRAMS:
        other.histogram(replace(metric, buckets=(0.123, 4.56)), "primary").observe(0.2)
        other.histogram(replace(metric, labels=("stranger",)), "x").observe(0.2)
    rows = watch(PoolAdvisor(tmp_path, clock=clock), clock, (Writer.open(tmp_path), traffic(40)))
    assert (RECOMMENDED, "primary") in rows
