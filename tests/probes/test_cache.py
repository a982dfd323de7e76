"""The cache probe against a real Redis: hits, misses and errors equal what the app was answered."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from demo_app.stack.process import free_port
from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.ledger import CACHE, Ledger
from fastapi_headroom.probes.cache import CacheProbe, cache_result
from fastapi_headroom.probes.cache_patterns import MAX_KEYS, MAX_PATTERNS, Patterns
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import REQUESTS, operations, results


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def sync_client(redis_server: Redis) -> Iterator[Any]:
    """A sync client made before the probe is bound."""
    client = redis.Redis.from_url(redis_server.url)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
async def async_client(redis_server: Redis) -> AsyncIterator[Any]:
    """An async client made before the probe is bound."""
    client = redis.asyncio.Redis.from_url(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
def probe(writer: Writer, sync_client: Any, async_client: Any) -> Iterator[CacheProbe]:
    probe = CacheProbe(load({}), names={"main": sync_client, "loop": async_client})
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()


def test_hits_and_misses_of_every_look_up(probe: CacheProbe, writer: Writer, sync_client: Any) -> None:
    """GET, MGET, HGET, HMGET, EXISTS, HGETALL and SMEMBERS count hits and misses as their replies say."""
    sync_client.mset({"product:1": "a", "product:2": "b"})
    sync_client.hset("user:1", mapping={"name": "x"})
    sync_client.sadd("tags:1", "new")
    assert sync_client.get("product:1") == b"a"
    assert sync_client.get("product:9") is None
    assert sync_client.mget("product:1", "product:2", "product:9") == [b"a", b"b", None]
    assert results(writer) == {("product:{}", "hit"): 3, ("product:{}", "miss"): 2}
    sync_client.hget("user:1", "name"), sync_client.hget("user:1", "none"), sync_client.hget("user:2", "name")
    sync_client.hmget("user:1", ["name", "none"])
    sync_client.hgetall("user:1"), sync_client.hgetall("user:2")
    assert results(writer)["user:{}", "hit"] == 3
    assert results(writer)["user:{}", "miss"] == 4
    sync_client.smembers("tags:1"), sync_client.smembers("tags:2")
    sync_client.exists("tags:1", "tags:2", "tags:3"), sync_client.getdel("tag:1")
    assert results(writer)["tags:{}", "hit"] == 2
    assert results(writer)["tags:{}", "miss"] == 3
    assert results(writer)["tag:{}", "miss"] == 1
    assert operations(writer) == {
        "mset": 1, "hset": 1, "sadd": 1, "get": 2, "mget": 1, "hget": 3, "hmget": 1, "hgetall": 2, "smembers": 2,
        "exists": 1, "getdel": 1,
    }  # fmt: skip


async def test_async_client(probe: CacheProbe, writer: Writer, async_client: Any) -> None:
    """The async client counts like the sync one, and the request's ledger gets the time."""
    books = Ledger("GET")
    ledger.current.set(books)
    assert await async_client.get("plan:1") is None
    await async_client.set("plan:1", "x")
    assert await async_client.get("plan:1") == b"x"
    books.finish(books.started + 10)
    assert results(writer, "loop") == {("plan:{}", "hit"): 1, ("plan:{}", "miss"): 1}
    assert operations(writer, "loop") == {"get": 2, "set": 1}
    assert books.cache_calls == 3
    assert books.waits == []
    assert 0 < books.seconds[CACHE] < 1


async def test_pipelines_by_position(probe: CacheProbe, writer: Writer, sync_client: Any, async_client: Any) -> None:
    """Replies of pipelines and transactions are judged one by one, in sync and async."""
    for transaction in (True, False):
        with sync_client.pipeline(transaction=transaction) as pipe:
            pipe.set("cart:1", "x").get("cart:1").get("order:1").mget("cart:1", "cart:2")
            pipe.execute()
        async with async_client.pipeline(transaction=transaction) as pipe:
            await pipe.set("cart:1", "x").get("cart:1").get("order:1").execute()
    assert results(writer) == {("cart:{}", "hit"): 4, ("cart:{}", "miss"): 2, ("order:{}", "miss"): 2}
    assert results(writer, "loop") == {("cart:{}", "hit"): 2, ("order:{}", "miss"): 2}
    assert operations(writer) == {"pipeline": 2}
    with sync_client.pipeline() as pipe:
        pipe.watch("cart:1")
        assert pipe.get("cart:1") == b"x"
        pipe.multi()
        pipe.set("cart:1", "y").execute()
    assert results(writer)["cart:{}", "hit"] == 5


def test_failing_commands_are_errors(probe: CacheProbe, writer: Writer, sync_client: Any) -> None:
    """A look-up that raises is an error: of a wrong type, alone, in a pipeline, or as one reply of it."""
    sync_client.hset("user:1", "name", "x")
    with pytest.raises(redis.ResponseError):
        sync_client.get("user:1")
    with pytest.raises(redis.ResponseError):
        sync_client.pipeline().get("user:1").execute()
    assert isinstance(sync_client.pipeline().get("user:1").get("none").execute(raise_on_error=False)[0], Exception)
    assert results(writer) == {("user:{}", "error"): 3, ("none", "miss"): 1}


async def test_dead_server(probe: CacheProbe, writer: Writer) -> None:
    """When nothing listens, every look-up is an error of the cache named by its address, sync and async."""
    port = free_port()
    sync_client = redis.Redis(port=port, retry=None, password="secret")
    async_client = redis.asyncio.Redis(port=port, db=2, retry=None)
    with pytest.raises(redis.ConnectionError):
        sync_client.get("product:1")
    with pytest.raises(redis.ConnectionError):
        await async_client.mget("product:1", "product:2")
    assert results(writer, f"localhost:{port}/0") == {("product:{}", "error"): 1}
    assert results(writer, f"localhost:{port}/2") == {("product:{}", "error"): 2}
    await async_client.aclose()


async def test_cancelled_commands_are_neither(
    probe: CacheProbe, writer: Writer, async_client: Any, redis_server: Redis
) -> None:
    """A cancelled look-up is no error and no miss, and the ledger's wait is closed."""
    books = Ledger("GET")
    ledger.current.set(books)
    os.kill(redis_server.pid, signal.SIGSTOP)  # it answers when it is told to, however slow this machine is
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(async_client.get("product:1"), 0.03)
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)
    await async_client.ping()
    assert results(writer, "loop") == {}
    assert books.waits == []


def test_brokers_do_not_pollute(probe: CacheProbe, writer: Writer, sync_client: Any) -> None:
    """Queue commands are left alone, and a task queue's own keys are no look-ups."""
    sync_client.lpush("celery", "job")
    sync_client.brpop("celery", timeout=1)
    sync_client.get("celery-task-meta-7d1b6c9e-1111-4222-8333-123456789abc")
    sync_client.smembers("_kombu.binding.celery")
    sync_client.pipeline().lpush("celery", "job").execute()
    assert results(writer) == {}
    assert operations(writer) == {"get": 1, "smembers": 1}


async def test_clients_made_after(probe: CacheProbe, writer: Writer, redis_server: Redis) -> None:
    """Clients made after bind are found and named by host, port and database."""
    name = f"127.0.0.1:{redis_server.port}/0"
    with redis.Redis.from_url(redis_server.url) as client:
        client.get("late:1")
    async with redis.asyncio.Redis.from_url(redis_server.url) as later:
        await later.get("late:2")
    assert results(writer, name) == {("late:{}", "miss"): 2}


def test_names_given_later_and_to_the_wrong_thing(probe: CacheProbe, writer: Writer, sync_client: Any) -> None:
    """A name given after the first commands counts from then on; what is no client is refused with the remedy."""
    sync_client.get("early:1")
    probe.name_clients({"second": sync_client})
    sync_client.get("early:1")
    assert results(writer, "second") == {("early:{}", "miss"): 1}
    with pytest.raises(SettingsError, match=r"redis\.Redis"):
        probe.name_clients({"second": "redis://localhost"})


def test_patterns_are_bounded(probe: CacheProbe, writer: Writer, sync_client: Any) -> None:
    """The hundred-and-first pattern is _OTHER, and no raw key is in any label."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for first in letters[:15]:
        for second in letters[:10]:
            sync_client.get(f"k{first}:l{second}:77")
    found = results(writer)
    assert len(found) == MAX_PATTERNS + 1
    assert found["_OTHER", "miss"] == 150 - MAX_PATTERNS
    assert not any("77" in pattern for pattern, _ in found)


def test_in_process_caches_report(probe: CacheProbe, writer: Writer) -> None:
    """cache_result counts hits and misses under the given name, and folds a raw key given by mistake."""
    cache_result("plans", hit=True, key_pattern="org:{}:plan")
    cache_result("plans", hit=False, key_pattern="org:17:plan")
    cache_result("plans", hit=True)
    assert results(writer, "plans") == {("org:{}:plan", "hit"): 1, ("org:{}:plan", "miss"): 1, ("", "hit"): 1}


def test_hit_and_miss_exist_from_the_first_look_up(probe: CacheProbe, writer: Writer, sync_client: Any) -> None:
    """The first miss makes the series of hits too, with 0."""
    sync_client.get("fresh:1")
    assert writer.value(REQUESTS, cache="main", key_pattern="fresh:{}", result="hit") == 0


def test_close_puts_everything_back(writer: Writer, sync_client: Any) -> None:
    """After close() redis-py's classes are as they were, and nothing is counted."""
    before = (redis.Redis.execute_command, redis.client.Pipeline.execute, redis.asyncio.Redis.execute_command)
    probe = CacheProbe(load({}))
    probe.bind(writer)
    assert redis.Redis.execute_command is not before[0]
    probe.close()
    probe.close()
    after = (redis.Redis.execute_command, redis.client.Pipeline.execute, redis.asyncio.Redis.execute_command)
    assert after == before
    sync_client.get("product:1")
    cache_result("plans", hit=True)
    assert not [name for name, _ in writer.samples() if name == REQUESTS]


def test_wraps_by_others_stay_and_nothing_counts_twice(
    writer: Writer, sync_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When another library wrapped on top of us, close() leaves its wrap alone and a new bind counts once."""
    probe = CacheProbe(load({}), names={"main": sync_client})
    probe.bind(writer)
    ours = redis.Redis.execute_command

    def theirs(client: Any, *args: Any, **options: Any) -> Any:
        return ours(client, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(redis.Redis, "execute_command", theirs)
        probe.close()
        assert redis.Redis.execute_command is theirs
        probe.bind(writer)
        sync_client.get("product:1")
        assert results(writer) == {("product:{}", "miss"): 1}
    probe.close()


async def test_a_failing_hook_does_not_reach_the_app(
    writer: Writer, sync_client: Any, async_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the probe itself fails, commands go on and the failure is counted."""
    probe = CacheProbe(load({}))
    probe.bind(writer)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken probe")

    monkeypatch.setattr("fastapi_headroom.probes.cache_patterns.Patterns.results", broken)
    sync_client.set("product:1", "x")
    assert sync_client.get("product:1") == b"x"
    assert await async_client.get("product:1") == b"x"
    assert sync_client.pipeline().get("product:1").execute() == [b"x"]
    assert writer.value("headroom_probe_up", probe="cache") == 0
    assert writer.value("headroom_probe_errors_total", probe="cache") == 3
    probe.close()


def test_remembered_keys_are_few_and_change_no_pattern(writer: Writer) -> None:
    """However many keys are looked up, a bounded number is kept, and each look-up goes to its own pattern."""
    series = Patterns(writer, "main")
    for number in range(3 * MAX_KEYS):
        for key in (f"product:{number}", f"org:{number}:plan".encode(), f"rq:job:{number}"):
            for _ in range(2):  # the second time it is known
                found = series.look_up(key)
                assert (found is None) == (key == f"rq:job:{number}")
                if found is not None:
                    found.hit.inc()
    assert results(writer) == {("product:{}", "hit"): 6 * MAX_KEYS, ("org:{}:plan", "hit"): 6 * MAX_KEYS}
    assert len(series.known) <= MAX_KEYS


def test_a_closed_probe_leaves_nothing_on_the_client(probe: CacheProbe, sync_client: Any) -> None:
    """What hangs on a client's connection pool while it is measured goes with the probe."""
    before = set(vars(sync_client.connection_pool))
    sync_client.get("product:1")
    assert set(vars(sync_client.connection_pool)) != before
    probe.close()
    assert set(vars(sync_client.connection_pool)) == before
