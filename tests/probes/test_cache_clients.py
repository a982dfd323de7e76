"""The cache probe under each kind of redis-py client: cluster, sentinel, client-side caching, scripts, transactions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.cache import CacheConfig
from redis.connection import CacheProxyConnection
from taskiq_redis import RedisAsyncClusterResultBackend, RedisAsyncSentinelResultBackend

from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE, Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import operations, results, value
from tests.support.redis_topologies import Cluster, Sentinel, sentinel_and_master

FAR_APART = ("plan:1", "plan:2", "plan:3", "plan:4", "plan:5", "plan:6")
"""Keys that lie on all three masters."""


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def probe(writer: Writer) -> Iterator[CacheProbe]:
    probe = CacheProbe(load({}))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinel]:
    with sentinel_and_master(tmp_path_factory.mktemp("sentinel")) as sentinel:
        yield sentinel


@pytest.mark.parametrize("protocol", [2, 3])
def test_cluster(probe: CacheProbe, writer: Writer, cluster: Cluster, protocol: int) -> None:
    """A cluster's client, its pipelines and its transactions count under one name, whichever node answers."""
    with redis.RedisCluster(host="127.0.0.1", port=cluster.port, protocol=protocol) as client:
        probe.name_clients({"main": client})
        client.flushall()
        assert len({client.get_node_from_key(key).port for key in FAR_APART}) == 3
        for key in FAR_APART[:4]:
            client.set(key, "x", ex=60)
        for key in FAR_APART:
            client.get(key)
        assert results(writer) == {("plan:{}", "hit"): 4, ("plan:{}", "miss"): 2}
        client.mget_nonatomic(*FAR_APART)
        assert results(writer) == {("plan:{}", "hit"): 8, ("plan:{}", "miss"): 4}
        client.exists(*FAR_APART)
        assert results(writer) == {("plan:{}", "hit"): 12, ("plan:{}", "miss"): 6}
        with client.pipeline() as pipe:
            for key in FAR_APART:
                pipe.get(key)
            assert [reply is None for reply in pipe.execute()] == [False] * 4 + [True] * 2
        assert results(writer) == {("plan:{}", "hit"): 16, ("plan:{}", "miss"): 8}
        with client.pipeline(transaction=True) as pipe:
            pipe.watch("{cart:1}:a")
            assert pipe.get("{cart:1}:a") is None
            pipe.multi()
            pipe.set("{cart:1}:a", "x")
            pipe.get("{cart:1}:a")
            pipe.execute()
        assert results(writer)["cart:{}:a", "miss"] == 1
        assert results(writer)["cart:{}:a", "hit"] == 1
    assert set(operations(writer)) <= {"set", "get", "mget", "exists", "pipeline"}


async def test_async_cluster(probe: CacheProbe, writer: Writer, cluster: Cluster) -> None:
    """The same for the async client, unnamed: the name is the address that it was given first."""
    with redis.RedisCluster(host="127.0.0.1", port=cluster.port) as other:
        other.flushall()
    async with redis.asyncio.RedisCluster(host="127.0.0.1", port=cluster.port, decode_responses=True) as client:
        for key in FAR_APART[:4]:
            await client.set(key, "x")
        for key in FAR_APART:
            await client.get(key)
        name = f"cluster@127.0.0.1:{cluster.port}"
        assert results(writer, name) == {("plan:{}", "hit"): 4, ("plan:{}", "miss"): 2}
        await client.mget_nonatomic(*FAR_APART)
        assert results(writer, name) == {("plan:{}", "hit"): 8, ("plan:{}", "miss"): 4}
        async with client.pipeline() as pipe:
            for key in FAR_APART:
                pipe.get(key)
            await pipe.execute()
        assert results(writer, name) == {("plan:{}", "hit"): 12, ("plan:{}", "miss"): 6}
        async with client.pipeline(transaction=True) as pipe:
            pipe.get("{cart:1}:a")
            pipe.get("{cart:1}:b")
            await pipe.execute()
        assert results(writer, name)["cart:{}:a", "miss"] == 1


async def test_sentinel(probe: CacheProbe, writer: Writer, sentinel: Sentinel) -> None:
    """Clients that a sentinel leads to their master count under the service's name, sync and async."""
    finder = redis.Sentinel([("127.0.0.1", sentinel.port)])
    with finder.master_for("shop", db=1) as client:
        client.set("plan:1", "x")
        assert client.get("plan:1") == b"x"
        assert client.pipeline().get("plan:2").execute() == [None]
    later = redis.asyncio.Sentinel([("127.0.0.1", sentinel.port)])
    async with later.master_for("shop", db=1, decode_responses=True) as client:
        assert await client.get("plan:1") == "x"
    with finder.slave_for("shop", db=1) as replica:
        replica.get("plan:9")
    assert results(writer, "shop/1") == {("plan:{}", "hit"): 2, ("plan:{}", "miss"): 2}
    for connected in finder.sentinels:
        connected.close()
    for link in later.sentinels:
        await link.aclose()


async def test_taskiq_results(
    probe: CacheProbe, writer: Writer, measured: Writer, cluster: Cluster, sentinel: Sentinel
) -> None:
    """Results of TaskIQ that lie in a cluster, or behind a sentinel, are timed and are no look-ups of a cache."""
    clustered = RedisAsyncClusterResultBackend[str](f"redis://127.0.0.1:{cluster.port}")
    found = RedisAsyncSentinelResultBackend[str]([("127.0.0.1", sentinel.port)], "shop")
    for results_of in (clustered, found):
        assert not await results_of.is_result_ready("0a1b")
        assert await results_of.get_progress("0a1b") is None
        await results_of.shutdown()
    name = f"cluster@127.0.0.1:{cluster.port}"
    assert operations(writer, name) == {"pipeline": 1.0, "get": 1.0}  # redis-py sends EXISTS to a cluster as one
    assert operations(writer, "shop/0") == {"exists": 1.0, "get": 1.0}
    assert results(writer, name) == results(writer, "shop/0") == {}


@pytest.fixture
def caching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let redis-py keep a cache with the server that is here: it speaks the protocol, redis-py wants a newer one."""
    monkeypatch.setattr(CacheProxyConnection, "MIN_ALLOWED_VERSION", "7.0.0")


@pytest.mark.usefixtures("caching")
@pytest.mark.parametrize("decode", [False, True], ids=["bytes", "text"])
def test_client_side_caching(probe: CacheProbe, writer: Writer, redis_server: Redis, decode: bool) -> None:
    """What the client answers from its own cache is a hit of a level of its own, and none of the server's."""
    with redis.Redis(port=redis_server.port, db=4) as other:
        other.flushdb()
        other.set("plan:1", "old")
    client = redis.Redis(port=redis_server.port, db=4, protocol=3, cache_config=CacheConfig(), decode_responses=decode)
    probe.name_clients({"main": client})
    for _ in range(3):
        client.get("plan:1")
    assert results(writer) == {("plan:{}", "hit"): 1}
    assert results(writer, "main:local") == {("plan:{}", "hit"): 2, ("plan:{}", "miss"): 1}
    with redis.Redis(port=redis_server.port, db=4) as other:
        other.set("plan:1", "new")  # the server tells the client
    name = f"localhost:{redis_server.port}/4"
    assert results(writer, name) == {}, "the other client read nothing"
    while (reply := client.get("plan:1")) in (b"old", "old"):
        pass
    assert reply in (b"new", "new")
    assert results(writer)["plan:{}", "hit"] == 2
    assert results(writer, "main:local")["plan:{}", "miss"] == 2
    client.mget("plan:1", "plan:2"), client.mget("plan:1", "plan:2")
    assert results(writer, "main:local")["plan:{}", "miss"] == 5  # the second one's nil is cached with the rest
    client.scard("tags:1"), client.set("plan:1", "x")
    assert operations(writer)["set"] == 1
    assert operations(writer, "main:local").keys() == {"get", "mget"}
    with pytest.raises(redis.ResponseError):
        client.hget("plan:1", "x")
    assert results(writer)["plan:{}", "error"] == 1
    client.close()


@pytest.mark.usefixtures("caching")
def test_client_side_caching_of_a_cluster(
    probe: CacheProbe, writer: Writer, cluster: Cluster, redis_server: Redis
) -> None:
    """A cluster's client with a cache of its own has the level too."""
    client = redis.RedisCluster(host="127.0.0.1", port=cluster.port, protocol=3, cache_config=CacheConfig())
    probe.name_clients({"main": client})
    client.flushall()
    for key in FAR_APART:
        client.set(key, "x")
        client.get(key), client.get(key)
    assert results(writer) == {("plan:{}", "hit"): 6}
    assert results(writer, "main:local") == {("plan:{}", "hit"): 6, ("plan:{}", "miss"): 6}
    client.close()


def test_scripts_and_locks(probe: CacheProbe, writer: Writer, redis_server: Redis) -> None:
    """Scripts are timed and judge nothing, whatever they return; neither do locks."""
    with redis.Redis(port=redis_server.port, db=5) as client:
        probe.name_clients({"main": client})
        client.flushdb()
        script = client.register_script("return redis.call('GET', KEYS[1])")
        assert script(keys=["plan:1"]) is None
        with client.lock("refresh:1", timeout=5):
            pass
        pipe = client.pipeline()
        script(keys=["plan:1"], client=pipe)
        pipe.get("plan:1")
        pipe.execute()
    assert results(writer) == {("plan:{}", "miss"): 1}
    assert operations(writer)["evalsha"] >= 2
    assert operations(writer)["pipeline"] == 1


async def test_transactions_that_conflict(probe: CacheProbe, writer: Writer, redis_server: Redis) -> None:
    """A transaction that a watched key put an end to is timed and is no error of the cache."""
    with redis.Redis(port=redis_server.port, db=5) as client:
        probe.name_clients({"main": client})
        with client.pipeline() as pipe:
            pipe.watch("stock:1")
            pipe.multi()
            pipe.get("stock:1")
            client.set("stock:1", "8")
            with pytest.raises(redis.WatchError):
                pipe.execute()
        client.delete("stock:1")
        assert client.transaction(lambda pipe: pipe.get("stock:1"), "stock:1") == []
    async with redis.asyncio.Redis(port=redis_server.port, db=5) as later:
        probe.name_clients({"loop": later})
        async with later.pipeline() as pipe:
            await pipe.watch("stock:1")
            assert await pipe.get("stock:1") is None
            pipe.multi()
            pipe.get("stock:1")
            assert await pipe.execute() == [None]
    assert results(writer) == {("stock:{}", "miss"): 1}
    assert results(writer, "loop") == {("stock:{}", "miss"): 2}


async def test_the_stage_of_the_ledger(probe: CacheProbe, writer: Writer, cluster: Cluster) -> None:
    """Each call, a pipeline too, is one call of the request and its time lies in the stage ``cache``."""
    books = Ledger("GET")
    ledger.current.set(books)
    async with redis.asyncio.RedisCluster(host="127.0.0.1", port=cluster.port) as client:
        await client.get("plan:1")
        async with client.pipeline() as pipe:
            await pipe.get("plan:1").get("plan:2").execute()
        with redis.RedisCluster(host="127.0.0.1", port=cluster.port) as other:
            other.get("plan:1")
    books.finish(books.started + 10)
    assert books.cache_calls == 3
    assert books.waits == []
    assert 0 < books.seconds[CACHE] < 5
    name = f"cluster@127.0.0.1:{cluster.port}"
    assert value(writer, "headroom_cache_operation_duration_seconds_count", cache=name, operation="get") == 2


def test_the_name_of_a_socket_and_no_password(probe: CacheProbe, writer: Writer) -> None:
    """A name that nobody gave holds neither the path of a socket nor a password."""
    client: Any = redis.Redis.from_url("unix://:very-secret@/run/secret/redis.sock?db=2", retry=None)
    with pytest.raises(redis.ConnectionError):
        client.get("plan:1")
    assert results(writer, "unix/2") == {("plan:{}", "error"): 1}
    assert "secret" not in str(writer.samples())
