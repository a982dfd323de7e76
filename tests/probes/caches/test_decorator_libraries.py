"""cashews and fastapi-cache2: what the app was answered is what the series say, in the process and in Redis, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiomcache
import httpx
import pytest
import redis.asyncio
from cashews import Cache
from cashews.backends.memory import Memory
from fastapi import FastAPI
from fastapi_cache import FastAPICache
from fastapi_cache.backends.inmemory import InMemoryBackend
from fastapi_cache.backends.memcached import MemcachedBackend
from fastapi_cache.backends.redis import RedisBackend
from fastapi_cache.decorator import cache as cached_answer

from demo_app.stack.process import free_port
from demo_app.stack.servers import Memcached, Redis
from fastapi_headroom.probes.caches.probe import LocalCachesProbe
from fastapi_headroom.store.writer import Writer

REQUESTS = "headroom_cache_requests_total"


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """The libraries are as they were, once the probe is closed."""
    originals = Memory.get, InMemoryBackend.get_with_ttl
    yield
    assert (Memory.get, InMemoryBackend.get_with_ttl) == originals


@pytest.fixture
async def cashews() -> AsyncIterator[Cache]:
    cache = Cache()
    yield cache
    await cache.close()


@pytest.fixture
def backend() -> Iterator[InMemoryBackend]:
    """fastapi-cache2 in memory; it keeps its entries in the class."""
    FastAPICache.init(backend := InMemoryBackend(), prefix="shop", expire=60)
    yield backend
    FastAPICache.reset()
    InMemoryBackend._store.clear()


def lookups(writer: Writer, cache: str) -> dict[str, tuple[float, ...]]:
    """Return hits, misses and errors of a cache by key pattern, all of them."""
    found: dict[str, dict[str, float]] = {}
    for (name, pairs), value in writer.samples().items():
        labels = dict(pairs)
        if name == REQUESTS and labels["cache"] == cache:
            found.setdefault(labels["key_pattern"], {})[labels["result"]] = value
    return {it: tuple(of.get(result, 0) for result in ("hit", "miss", "error")) for it, of in found.items()}


def caches(writer: Writer) -> set[str]:
    """Return every cache that has look-ups."""
    return {dict(pairs)["cache"] for (name, pairs), value in writer.samples().items() if name == REQUESTS and value}


async def until(condition: Callable[[], Any]) -> None:
    """Await a condition."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_cashews_memory_counts_each_key_once(probe: LocalCachesProbe, writer: Writer, cashews: Cache) -> None:
    """get, get_many, exists, get_or_set and decorators count what they were answered, by key pattern."""
    cashews.setup("mem://")
    await cashews.set("plan:1", "team")
    assert await cashews.get("plan:1") == "team" and await cashews.get("plan:2", default="free") == "free"
    assert await cashews.get_many("plan:1", "plan:3") == ("team", None)
    assert await cashews.exists("plan:1") and not await cashews.exists("plan:4")
    assert [await cashews.get_or_set("zero:1", 0) for _ in range(2)] == [0, 0]
    assert [pair async for pair in cashews.get_match("plan:*")] == [("plan:1", "team")]
    assert await cashews.incr("views:1") == 1

    @cashews(ttl="1m", key="rate:{day}")
    async def rate(day: int) -> None:
        return None

    @cashews.early(ttl="1m", early_ttl="30s", key="tax:{day}")
    async def tax(day: int) -> int:
        return day

    for _ in range(2):
        assert await rate(1) is None
        assert await tax(7) == 7
    assert lookups(writer, "cashews") == {
        "plan:{}": (3, 3, 0),
        "zero:{}": (1, 1, 0),
        "rate:{}": (1, 1, 0),
        "early:{}:tax:{}": (1, 1, 0),
    }
    assert caches(writer) == {"cashews"}


async def test_what_cashews_reads_for_itself_is_no_lookup(
    probe: LocalCachesProbe, writer: Writer, cashews: Cache
) -> None:
    """Its task that throws out what has expired, and a transaction's own writes, count nothing."""
    memory = cashews.setup("mem://?check_interval=0.001")
    await cashews.set("plan:1", "team")
    await cashews.set("plan:2", "solo", expire=0.01)
    await until(lambda: "plan:2" not in memory.store)
    assert lookups(writer, "cashews") == {}
    async with cashews.transaction():
        await cashews.set("plan:3", "own")
        assert await cashews.get_many("plan:1", "plan:3") == ("team", "own")
        assert await cashews.get("plan:3") == "own" and await cashews.get("plan:9") is None
    assert lookups(writer, "cashews") == {"plan:{}": (1, 1, 0)}


async def test_a_cashews_memory_can_be_named(probe: LocalCachesProbe, writer: Writer, cashews: Cache) -> None:
    """What setup() returns takes a name of the user's choice, and its neighbour keeps the library's."""
    assert probe.name_caches({"rates": cashews.setup("mem://", prefix="rate:")}) == {}
    cashews.setup("mem://")
    assert await cashews.get("rate:1") is None and await cashews.get("plan:1") is None
    assert (lookups(writer, "rates"), lookups(writer, "cashews")) == ({"rate:{}": (0, 1, 0)}, {"plan:{}": (0, 1, 0)})


async def test_cashews_on_redis_is_measured_by_its_client(
    probe: LocalCachesProbe, writer: Writer, cashews: Cache, redis_server: Redis
) -> None:
    """Reads of its Redis backend are counted once, by redis-py's probe, those of decorators among them."""
    cashews.setup(f"redis://127.0.0.1:{redis_server.port}/6", socket_timeout=30)
    await cashews.clear()
    await cashews.set("price:1", 5, expire=60)
    assert await cashews.get("price:1") == 5 and await cashews.get("price:2") is None
    assert await cashews.get_many("price:1", "price:3") == (5, None)

    @cashews(ttl="1m", key="rate:{day}")
    async def rate(day: int) -> int:
        return day

    assert [await rate(1), await rate(1)] == [1, 1]
    name = f"127.0.0.1:{redis_server.port}/6"
    assert lookups(writer, name) == {"price:{}": (2, 2, 0), "rate:{}": (1, 1, 0)}
    assert caches(writer) == {name}


async def test_memory_in_front_of_redis_is_a_level_of_its_own(
    probe: LocalCachesProbe, writer: Writer, cashews: Cache, redis_server: Redis
) -> None:
    """With client_side, hits in memory never reach Redis; misses go on to it; a key known to be absent stays a miss."""
    async with redis.asyncio.Redis(port=redis_server.port, db=7) as other:
        await other.flushdb()
    cashews.setup(f"redis://127.0.0.1:{redis_server.port}/7", client_side=True, socket_timeout=30)
    await cashews.set("price:1", 5, expire=60)
    assert [await cashews.get("price:1") for _ in range(3)] == [5, 5, 5]
    assert [await cashews.get("price:2") for _ in range(3)] == [None, None, None]
    assert lookups(writer, "cashews") == {"price:{}": (3, 3, 0)}
    assert lookups(writer, f"127.0.0.1:{redis_server.port}/7") == {"cashews:price:{}": (0, 1, 0)}


async def test_a_redis_that_is_down_is_errors_though_cashews_hides_them(
    probe: LocalCachesProbe, writer: Writer, cashews: Cache
) -> None:
    """cashews answers the default when Redis is down; the look-up is an error all the same, and no miss."""
    port = free_port()
    cashews.setup(f"redis://127.0.0.1:{port}/0")
    assert await cashews.get("price:1", default="none") == "none"
    assert lookups(writer, f"127.0.0.1:{port}/0") == {"price:{}": (0, 0, 1)}


async def test_keys_of_both_libraries_stay_inside(
    probe: LocalCachesProbe, writer: Writer, cashews: Cache, backend: InMemoryBackend
) -> None:
    """An e-mail address and a token in a key reach no label."""
    cashews.setup("mem://")
    for key in ("user:ann@example.org", "session:Zx81qPw93LkdT5vBnM2s"):
        assert await cashews.get(key) is None and await backend.get(key) is None
    expected = {"user:{}": (0, 1, 0), "session:{}": (0, 1, 0)}
    assert lookups(writer, "cashews") == lookups(writer, "fastapi-cache2") == expected


async def test_fastapi_caches_memory_counts(probe: LocalCachesProbe, writer: Writer, backend: InMemoryBackend) -> None:
    """get and get_with_ttl count what they were answered; an entry that has expired is a miss."""
    await backend.set("plan:1", b"team", 60)
    await backend.set("plan:2", b"solo", -5)
    assert await backend.get("plan:1") == b"team" and await backend.get("plan:3") is None
    assert (await backend.get_with_ttl("plan:1"))[1] == b"team"
    assert await backend.get_with_ttl("plan:2") == (0, None)
    assert lookups(writer, "fastapi-cache2") == {"plan:{}": (2, 2, 0)}


def app() -> FastAPI:
    """Return an app with one cached endpoint."""
    app = FastAPI()

    @app.get("/products/{product_id}")
    @cached_answer(expire=60, namespace="products")
    async def product(product_id: int) -> dict[str, int]:
        return {"id": product_id}

    return app


async def ask(app: FastAPI, *ids: int) -> list[str]:
    """Return what the decorator says of each answer."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return [(await client.get(f"/products/{it}")).headers["x-fastapi-cache"] for it in ids]


async def test_the_cache_decorator_in_memory(probe: LocalCachesProbe, writer: Writer, backend: InMemoryBackend) -> None:
    """Hits and misses are those of its X-FastAPI-Cache header, under the namespace."""
    assert await ask(app(), 1, 1, 2, 1) == ["MISS", "HIT", "MISS", "HIT"]
    assert lookups(writer, "fastapi-cache2") == {"shop:products:{}": (2, 2, 0)}


async def test_the_cache_decorator_on_redis(probe: LocalCachesProbe, writer: Writer, redis_server: Redis) -> None:
    """In Redis the same look-ups are counted once, by redis-py's probe."""
    async with redis.asyncio.Redis(port=redis_server.port, db=8) as client:
        await client.flushdb()
        FastAPICache.init(RedisBackend(client), prefix="shop", expire=60)
        try:
            assert await ask(app(), 1, 1, 2, 1) == ["MISS", "HIT", "MISS", "HIT"]
        finally:
            FastAPICache.reset()
    name = f"localhost:{redis_server.port}/8"
    assert lookups(writer, name) == {"shop:products:{}": (2, 2, 0)}
    assert caches(writer) == {name}


async def test_fastapi_cache_on_memcached_is_measured_by_its_client(
    probe: LocalCachesProbe, writer: Writer, tmp_path: Path
) -> None:
    """In memcached look-ups are counted once, by aiomcache's probe."""
    with Memcached(tmp_path / "memcached") as server:
        client = aiomcache.Client("127.0.0.1", server.port)
        FastAPICache.init(MemcachedBackend(client), prefix="shop", expire=60)
        try:
            assert await ask(app(), 1, 1, 2, 1) == ["MISS", "HIT", "MISS", "HIT"]
        finally:
            FastAPICache.reset()
            await client.close()
    name = f"127.0.0.1:{server.port}"
    assert lookups(writer, name) == {"shop:products:{}": (2, 2, 0)}
    assert caches(writer) == {name}
