"""The shop's cache-aside on a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from redis.asyncio import Redis

import fastapi_headroom as headroom
from demo_app.cache import CacheAside, LocalCache, connect
from demo_app.changes import CHANNEL, Changes
from demo_app.faults import Switches
from demo_app.schemas import PlanOut
from demo_app.stack.process import free_port
from demo_app.stack.servers import Redis as RedisServer
from fastapi_headroom.testing import capture_metrics

KEY = ("plan:{}", 1)
PLAN = PlanOut(id=1, name="team", monthly_cents=4_900, seats=25)


class Origin:
    """A slow database that counts how often it is asked."""

    def __init__(self, plan: PlanOut | None = PLAN) -> None:
        self.plan, self.loads = plan, 0

    async def __call__(self) -> PlanOut | None:
        """Load the plan."""
        self.loads += 1
        await asyncio.sleep(0.02)
        return self.plan


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """An empty Redis."""
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    yield client
    await client.aclose()


def aside(redis: Redis, changes: Changes | None = None, *, lags: bool = False) -> CacheAside:
    """Return a cache whose entries live for a minute."""
    return CacheAside(redis, "redis", 60, changes or Changes(redis), lags=lags)


async def test_what_was_loaded_once_is_served_from_redis(redis: Redis) -> None:
    """The second read does not load, and the entry lives for the time to live, give or take a tenth."""
    cache, origin = aside(redis), Origin()
    began = time.monotonic()
    assert await cache.get(*KEY, PlanOut, origin) == PLAN
    assert await cache.get(*KEY, PlanOut, origin) == PLAN
    assert origin.loads == 1
    left = await redis.pttl("plan:1")
    assert 54_000 - 1_000 * (time.monotonic() - began) - 1 <= left <= 66_000


async def test_concurrent_misses_load_once(redis: Redis) -> None:
    """Fifty requests for a missing key cause one load, also when one of them is cancelled."""
    cache, origin = aside(redis), Origin()
    readers = [asyncio.create_task(cache.get(*KEY, PlanOut, origin)) for _ in range(50)]
    while origin.loads == 0:
        await asyncio.sleep(0)
    readers[0].cancel()
    answers = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError) and answers[1:] == [PLAN] * 49
    assert origin.loads == 1


async def test_a_dropped_entry_is_loaded_anew(redis: Redis) -> None:
    """After an update and its drop the next read sees the new value."""
    cache, origin = aside(redis), Origin()
    await cache.get(*KEY, PlanOut, origin)
    origin.plan = PLAN.model_copy(update={"seats": 26})
    await cache.drop(*KEY)
    fresh = await cache.get(*KEY, PlanOut, origin)
    assert fresh is not None and fresh.seats == 26


async def test_nothing_is_not_stored(redis: Redis) -> None:
    """A key without an origin is asked for again each time, so that it appears as soon as it exists."""
    cache, origin = aside(redis), Origin(None)
    assert await cache.get("plan:{}", 9, PlanOut, origin) is None
    assert await cache.get("plan:{}", 9, PlanOut, origin) is None
    assert origin.loads == 2


async def test_redis_down_costs_speed_only() -> None:
    """Without a Redis reads load, once for all who ask at once, drops are quiet, and nobody waits for retries."""
    client = connect(f"redis://127.0.0.1:{free_port()}")
    cache, origin = aside(client), Origin()
    took = []
    for _ in range(3):  # the machine may have been busy with something else
        began, loads = time.monotonic(), origin.loads
        assert await asyncio.gather(*(cache.get(*KEY, PlanOut, origin) for _ in range(20))) == [PLAN] * 20
        await cache.drop(*KEY)
        took.append(time.monotonic() - began)
        assert origin.loads == loads + 1
    assert min(took) < 1
    await client.aclose()


async def test_the_fault_makes_every_look_up_miss(redis: Redis, switches: Switches) -> None:
    """With cache_off on, reads still ask Redis and always miss; switched off they hit again."""
    cache, origin = aside(redis), Origin()
    switches.set("cache_off", True)
    for _ in range(3):
        await cache.get(*KEY, PlanOut, origin)
    assert origin.loads == 3
    switches.set("cache_off", False)
    await cache.get(*KEY, PlanOut, origin)
    assert origin.loads == 3


async def test_the_local_cache_loads_again_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value is kept for the time to live and loaded anew after it, or when it is dropped."""
    now = 1_000.0
    monkeypatch.setattr("demo_app.cache.time", SimpleNamespace(monotonic=lambda: now))
    local, origin = LocalCache("plans", ttl=0.1), Origin()
    await local.get(origin)
    await local.get(origin)
    assert origin.loads == 1
    now += 0.12
    await local.get(origin)
    assert origin.loads == 2
    local.drop()
    await local.get(origin)
    assert origin.loads == 3


async def test_an_entry_whose_origin_has_changed_is_never_served(redis: Redis, switches: Switches) -> None:
    """Also where deleting it failed: the event says that it is old, and it is loaded anew. The fault serves it."""
    changes, origin = Changes(redis), Origin()
    cache = aside(redis, changes)
    await cache.get(*KEY, PlanOut, origin)
    origin.plan = PLAN.model_copy(update={"seats": 26})
    switches.set("stale_cache", True)
    await cache.drop(*KEY)
    assert await cache.get(*KEY, PlanOut, origin) == PLAN
    switches.set("stale_cache", False)
    assert await cache.get(*KEY, PlanOut, origin) == origin.plan
    assert origin.loads == 2


async def test_a_change_reaches_other_workers(redis: Redis) -> None:
    """What one worker tells, another one hears: it calls who listens, once, and knows older entries for stale."""
    here, there = Changes(redis), Changes(redis)
    heard: list[str] = []
    there.on_change(heard.append)
    listening = asyncio.create_task(there.listen())
    while not (await redis.pubsub_numsub(CHANNEL))[0][1]:
        await asyncio.sleep(0.01)
    before = time.time()
    await here.tell("plan:1")
    async with asyncio.timeout(30):
        while not heard:
            await asyncio.sleep(0.01)
    assert heard == ["plan:1"] and there.after("plan:1", before) and not there.after("plan:1", time.time())
    listening.cancel()


async def test_a_region_that_lags_serves_what_it_has_and_says_so(redis: Redis, tmp_path: Path) -> None:
    """A second region's entry that has changed since is served until its time is over, and counted as stale."""
    changes, origin = Changes(redis), Origin()
    west = aside(redis, changes, lags=True)
    await west.get(*KEY, PlanOut, origin)
    await changes.tell("plan:1")
    with capture_metrics() as metrics:
        app = FastAPI()
        handle = headroom.init(app, directory=tmp_path, exporter=False)
        with TestClient(app):
            assert await west.get(*KEY, PlanOut, origin) == PLAN
            stale = metrics.value("headroom_cache_requests_total", cache="redis", key_pattern="plan:{}", result="stale")
    handle.shutdown()
    assert (origin.loads, stale) == (1, 1)


async def test_naive_readers_all_load(redis: Redis) -> None:
    """Without single flight ten who miss at once load ten times, and the entry is gone after a second."""
    cache, origin = aside(redis), Origin()

    async def load() -> PlanOut | None:
        plan = await origin()
        while origin.loads < 10:  # all of them have missed before the first one stores
            await asyncio.sleep(0.005)
        return plan

    async with asyncio.timeout(30):
        await asyncio.gather(*(cache.get(*KEY, PlanOut, load, naive=True) for _ in range(10)))
    assert origin.loads == 10
    assert await redis.pttl("plan:1") in {*range(1_001), -2}, "a second at most, or it is over; -1 would be for good"
    async with asyncio.timeout(30):
        while await redis.exists("plan:1"):
            await asyncio.sleep(0.02)
