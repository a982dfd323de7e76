"""The shop's cache-aside on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from demo_app.cache import CacheAside, LocalCache
from demo_app.faults import Switches
from demo_app.schemas import PlanOut
from demo_app.stack.process import free_port
from demo_app.stack.servers import Redis as RedisServer

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


async def test_what_was_loaded_once_is_served_from_redis(redis: Redis) -> None:
    """The second read does not load, and the entry lives for the time to live, give or take a tenth."""
    cache, origin = CacheAside(redis, ttl=60), Origin()
    assert await cache.get("plan:1", PlanOut, origin) == PLAN
    assert await cache.get("plan:1", PlanOut, origin) == PLAN
    assert origin.loads == 1
    assert 53_000 <= await redis.pttl("plan:1") <= 66_000


async def test_concurrent_misses_load_once(redis: Redis) -> None:
    """Fifty requests for a missing key cause one load, also when one of them is cancelled."""
    cache, origin = CacheAside(redis, ttl=60), Origin()
    readers = [asyncio.create_task(cache.get("plan:1", PlanOut, origin)) for _ in range(50)]
    while origin.loads == 0:
        await asyncio.sleep(0)
    readers[0].cancel()
    answers = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError) and answers[1:] == [PLAN] * 49
    assert origin.loads == 1


async def test_a_dropped_entry_is_loaded_anew(redis: Redis) -> None:
    """After an update and its drop the next read sees the new value."""
    cache, origin = CacheAside(redis, ttl=60), Origin()
    await cache.get("plan:1", PlanOut, origin)
    origin.plan = PLAN.model_copy(update={"seats": 26})
    await cache.drop("plan:1")
    fresh = await cache.get("plan:1", PlanOut, origin)
    assert fresh is not None and fresh.seats == 26


async def test_nothing_is_not_stored(redis: Redis) -> None:
    """A key without an origin is asked for again each time, so that it appears as soon as it exists."""
    cache, origin = CacheAside(redis, ttl=60), Origin(None)
    assert await cache.get("plan:9", PlanOut, origin) is None
    assert await cache.get("plan:9", PlanOut, origin) is None
    assert origin.loads == 2


async def test_redis_down_costs_speed_only() -> None:
    """Without a Redis every read loads and every drop is quiet."""
    client = Redis.from_url(f"redis://127.0.0.1:{free_port()}", socket_connect_timeout=0.2)
    cache, origin = CacheAside(client, ttl=60), Origin()
    assert await cache.get("plan:1", PlanOut, origin) == PLAN
    await cache.drop("plan:1")
    await client.aclose()


async def test_the_fault_makes_every_look_up_miss(redis: Redis, switches: Switches) -> None:
    """With cache_off on, reads still ask Redis and always miss; switched off they hit again."""
    cache, origin = CacheAside(redis, ttl=60), Origin()
    switches.set("cache_off", True)
    for _ in range(3):
        await cache.get("plan:1", PlanOut, origin)
    assert origin.loads == 3
    switches.set("cache_off", False)
    await cache.get("plan:1", PlanOut, origin)
    assert origin.loads == 3


async def test_the_local_cache_loads_again_after_its_time() -> None:
    """A value is kept for the time to live and loaded anew after it, or when it is dropped."""
    local, origin = LocalCache(ttl=0.1), Origin()
    await local.get(origin)
    await local.get(origin)
    assert origin.loads == 1
    await asyncio.sleep(0.12)
    await local.get(origin)
    assert origin.loads == 2
    local.drop()
    await local.get(origin)
    assert origin.loads == 3
