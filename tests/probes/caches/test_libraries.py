"""Caches of other libraries on real servers: what their clients were answered is what the series say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiocache
import aiomcache
import pymemcache
import pytest
from pymemcache.client.hash import HashClient
from pymemcache.client.retrying import RetryingClient

from demo_app.stack.process import free_port
from demo_app.stack.servers import Memcached
from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE, Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.caches.probe import LocalCachesProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

REQUESTS = "headroom_cache_requests_total"


@pytest.fixture(scope="module")
def memcached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    """A real memcached on a free port."""
    data = tmp_path_factory.mktemp("memcached")
    with Memcached(data / "data") as server:
        yield server


def counts(writer: Writer, cache: str, pattern: str) -> tuple[float, float]:
    """Return hits and misses of a key pattern."""
    hit, miss = (writer.value(REQUESTS, cache=cache, key_pattern=pattern, result=it) for it in ("hit", "miss"))
    return hit, miss


def kinds(address: tuple[str, int]) -> list[Any]:
    return [
        pymemcache.Client(address),
        pymemcache.PooledClient(address, max_pool_size=2),
        HashClient([address]),
        HashClient([address], use_pooling=True),
        RetryingClient(pymemcache.Client(address), attempts=2),
    ]


@pytest.mark.parametrize("kind", range(5), ids=["plain", "pooled", "hashed", "hashed-pooled", "retrying"])
def test_pymemcache_counts_each_key_once(
    probe: LocalCachesProbe, writer: Writer, memcached: Memcached, kind: int
) -> None:
    """Hits and misses of get, gets, get_many and their like equal the answers, for every kind of client."""
    client, cache = kinds(("127.0.0.1", memcached.port))[kind], f"127.0.0.1:{memcached.port}"
    client.flush_all()
    client.set("user:1", "ann", expire=60, noreply=False)
    client.set_many({"user:2": "bob", "user:3": "eve"}, noreply=False)
    assert client.get("user:1") == b"ann"
    assert client.get("user:9") is None and client.get("user:9", "nobody") == "nobody"
    assert len(client.get_many(["user:1", "user:2", "user:8"])) == 2
    assert len(client.get_many(("user:3",))) == 1
    assert client.gets("user:2")[0] == b"bob"
    client.delete("user:1", noreply=False)
    assert counts(writer, cache, "user:{}") == (5, 3)
    assert writer.value("headroom_cache_operation_duration_seconds_count", cache=cache, operation="get") == 4
    assert writer.value("headroom_cache_payload_bytes_sum", cache=cache, direction="write") == 9
    assert writer.value("headroom_cache_entry_age_seconds_count", cache=cache) >= 1
    client.close()


async def test_aiomcache_counts_and_fills_the_cache_stage(
    probe: LocalCachesProbe, writer: Writer, memcached: Memcached
) -> None:
    """Look-ups by get and multi_get equal the answers, and the request's time lies in its cache stage."""
    client = aiomcache.Client("127.0.0.1", memcached.port)
    probe.name_caches({"sessions": client})
    request = Ledger("/")
    token = ledger.current.set(request)
    try:
        await client.flush_all()
        await client.set(b"session:1", b"ann", exptime=60)
        assert await client.get(b"session:1") == b"ann" and await client.get(b"session:2") is None
        assert await client.multi_get(b"session:1", b"session:3") == (b"ann", None)
    finally:
        ledger.current.reset(token)
        await client.close()
    assert counts(writer, "sessions", "session:{}") == (2, 2)
    assert request.cache_calls == 4 and request.seconds[CACHE] > 0


async def test_concurrent_misses_in_memcached_are_a_stampede(
    probe: LocalCachesProbe, writer: Writer, memcached: Memcached
) -> None:
    """Five tasks that miss one key at once, before anybody has filled it, are four duplicates."""
    client = aiomcache.Client("127.0.0.1", memcached.port, pool_size=5)
    await client.flush_all()
    together = asyncio.Barrier(5)

    async def fill() -> None:
        assert await client.get(b"hot") is None
        await together.wait()
        await client.set(b"hot", b"value")

    await asyncio.gather(*(fill() for _ in range(5)))
    await client.close()
    cache = f"127.0.0.1:{memcached.port}"
    assert writer.value("headroom_cache_duplicate_fills_total", cache=cache, key_pattern="hot") == 4


def test_a_memcached_that_is_down_is_errors(probe: LocalCachesProbe, writer: Writer) -> None:
    """Every key of a failed look-up is an error, the error reaches the app, and the probe stays up."""
    port = free_port()
    client = pymemcache.Client(("127.0.0.1", port), connect_timeout=0.5)
    with pytest.raises(ConnectionRefusedError):
        client.get("user:1")
    with pytest.raises(ConnectionRefusedError):
        client.get_many(["user:1", "user:2"])
    labels = {"cache": f"127.0.0.1:{port}", "key_pattern": "user:{}"}
    assert writer.value(REQUESTS, **labels, result="error") == 3


@pytest.fixture
async def memory() -> AsyncIterator[aiocache.SimpleMemoryCache]:
    cache = aiocache.SimpleMemoryCache(namespace="shop:")
    yield cache
    await cache.clear()


async def test_aiocaches_memory_counts(
    probe: LocalCachesProbe, writer: Writer, memory: aiocache.SimpleMemoryCache
) -> None:
    """get, multi_get, exists and the decorator count what they were answered, under a name of the user's choice."""
    await memory.set("plan:1", "team")
    assert await memory.get("plan:1") == "team" and await memory.get("plan:2") is None
    assert await memory.multi_get(["plan:1", "plan:3"]) == ["team", None]
    assert await memory.exists("plan:1")
    assert counts(writer, "aiocache", "shop:plan:{}") == (3, 2)
    assert not any("timed" in name for name, _ in writer.samples())

    @aiocache.cached(key="rates")
    async def rates() -> int:
        return 7

    probe.name_caches({"rates": rates.cache})
    assert [await rates(), await rates()] == [7, 7]
    assert counts(writer, "rates", "rates") == (1, 1)


async def test_aiocache_on_memcached_is_measured_by_its_client(
    probe: LocalCachesProbe, writer: Writer, memcached: Memcached
) -> None:
    """aiocache's memcached talks through aiomcache, which is counted once."""
    cache = aiocache.MemcachedCache(endpoint="127.0.0.1", port=memcached.port)
    await cache.set("price:1", "5", ttl=60)
    assert await cache.get("price:1") == "5" and await cache.get("price:2") is None
    await cache.close()
    assert counts(writer, f"127.0.0.1:{memcached.port}", "price:{}") == (1, 1)


def test_closing_puts_the_libraries_back(writer: Writer, memcached: Memcached) -> None:
    """After close() the classes are as they were."""
    owner: Callable[..., Any] = pymemcache.Client.get
    cache = CacheProbe(load({}))
    probe = LocalCachesProbe(cache)
    cache.bind(writer)
    probe.bind(writer)
    assert pymemcache.Client.get is not owner
    probe.close()
    cache.close()
    assert pymemcache.Client.get is owner
