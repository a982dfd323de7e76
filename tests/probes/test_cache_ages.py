"""What the cache probe says of ages, sizes, time-outs and invalidations, against a real Redis."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

import fastapi_headroom as headroom
from demo_app.stack.servers import Redis, find
from fastapi_headroom.probes import cache as cache_module
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.cache_ages import MAX_ENTRIES, UNKNOWN, Ages, LifeTime
from fastapi_headroom.probes.cache_effects import lifetime_of, size_of
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import operations, results, value

AGES = "headroom_cache_entry_age_seconds"
BYTES = "headroom_cache_payload_bytes"


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def client(redis_server: Redis) -> Iterator[Any]:
    with redis.Redis(port=redis_server.port, db=7) as client:
        client.flushdb()
        yield client


@pytest.fixture
def probe(writer: Writer, client: Any) -> Iterator[CacheProbe]:
    probe = CacheProbe(load({}), names={"main": client})
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()


def ages(writer: Writer) -> tuple[float, float]:
    """Return how many ages were served, and their sum in seconds."""
    return value(writer, f"{AGES}_count", cache="main"), value(writer, f"{AGES}_sum", cache="main")


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock that the hooks read run ahead."""
    monkeypatch.setattr(cache_module.CacheProbe, "command_done", _ahead(CacheProbe.command_done, seconds, 5))
    monkeypatch.setattr(cache_module.CacheProbe, "pipeline_done", _ahead(CacheProbe.pipeline_done, seconds, 4))


def _ahead(original: Any, seconds: float, position: int) -> Any:
    def done(probe: Any, *args: Any) -> None:
        original(probe, *args[:position], args[position] + seconds, *args[position + 1 :])

    return done


def test_age_of_what_this_process_wrote(
    probe: CacheProbe, writer: Writer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry written with a time to live is as old as the write when it is served; others have no age."""
    client.set("plan:1", "x", ex=100)
    client.execute_command("SETEX", "plan:2", 100, "x")
    client.set("plan:3", "x")
    with monkeypatch.context() as patch:
        later(patch, 30.0)
        client.get("plan:1")
        count, total = ages(writer)
        assert count == 1
        assert 30 <= total < 31
        client.mget("plan:1", "plan:2", "plan:3", "plan:4")
        assert ages(writer)[0] == 3
    buckets = {
        dict(labels)["le"]: number for (name, labels), number in writer.samples().items() if name == f"{AGES}_bucket"
    }
    assert buckets["15.0"] == 0
    assert buckets["60.0"] == 3


def test_age_ends_with_the_time_to_live(
    probe: CacheProbe, writer: Writer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there after our entry ran out somebody else has written: no age, rather than a wrong one."""
    client.set("plan:1", "x", ex=100)
    with monkeypatch.context() as patch:
        later(patch, 101.0)
        assert client.get("plan:1") == b"x"
    client.get("plan:1")
    assert ages(writer)[0] == 0


def test_age_through_deletes_and_changes(
    probe: CacheProbe, writer: Writer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write starts the age anew, a delete ends it, EXPIRE and GETEX prolong it, PERSIST leaves it unknown."""
    client.set("plan:1", "x", ex=10)
    client.getex("plan:1", ex=1000)
    client.hset("user:1", "name", "x"), client.expire("user:1", 1000)
    client.set("plan:2", "x", px=500_000), client.delete("plan:2"), client.set("plan:2", "x")
    client.set("plan:3", "x", ex=1000), client.persist("plan:3")
    client.set("plan:4", "x", nx=True, ex=1000), client.set("plan:4", "y", nx=True, ex=5)
    client.set("plan:5", "x", ex=1000), client.set("plan:5", "y", keepttl=True)
    with monkeypatch.context() as patch:
        later(patch, 100.0)
        for key, served in (("plan:1", 1), ("plan:2", 0), ("plan:3", 0), ("plan:4", 1), ("plan:5", 1)):
            before = ages(writer)[0]
            client.get(key)
            assert ages(writer)[0] - before == served, key
        before = ages(writer)[0]
        client.hgetall("user:1")
        assert ages(writer)[0] - before == 1
        client.set("plan:1", "new", ex=1000)
        before = ages(writer)
        client.get("plan:1")
        assert ages(writer)[1] - before[1] < 1


def test_age_from_the_time_left(probe: CacheProbe, writer: Writer, client: Any, redis_server: Redis) -> None:
    """Where the app asks how long an entry has left, its age follows, also of one that another process wrote."""
    client.set("plan:1", "x", ex=100)
    another = [find("redis-cli"), "-p", str(redis_server.port), "-n", "7", "SET", "plan:2", "x", "EX", "40"]
    subprocess.run(another, check=True, capture_output=True)  # 60 seconds ago, as it were
    client.get("plan:2")
    assert ages(writer)[0] == 0
    assert client.pipeline(transaction=False).get("plan:2").pttl("plan:2").execute()[0] == b"x"
    count, total = ages(writer)
    assert count == 1
    assert 60 <= total < 61
    client.get("plan:2")
    assert ages(writer)[0] == 2
    client.ttl("plan:none"), client.get("plan:none")
    assert ages(writer)[0] == 2


def test_times_to_live_that_vary_tell_no_age(writer: Writer) -> None:
    """Jitter of a fifth is one time to live; where a pattern has several, none is concluded from."""
    lifetime = LifeTime()
    for seconds in (100.0, 110.0, 95.0):
        lifetime.saw(seconds)
    assert lifetime.seconds == 95.0
    lifetime.saw(3600.0), lifetime.saw(95.0)
    assert lifetime.seconds == UNKNOWN
    ages = Ages()
    ages.left("plan:1", 0.0, 50.0, lifetime.seconds)
    assert ages.of("plan:1", 0.0) is None


def test_ages_are_bounded() -> None:
    """However many entries are written, a bounded number is remembered, the latest ones, and no key."""
    ages = Ages()
    for number in range(3 * MAX_ENTRIES):
        ages.wrote(f"plan:{number}", 0.0, 60.0)
        if number % 100 == 0:
            ages.wrote("plan:again", 0.0, 60.0)
    assert ages.of("plan:again", 5.0) == 5.0
    assert MAX_ENTRIES // 2 < len(ages.entries) <= MAX_ENTRIES
    assert ages.of(f"plan:{3 * MAX_ENTRIES - 1}", 5.0) == 5.0
    assert ages.of("plan:1", 5.0) is None
    assert all(type(place) is int for place in ages.entries)


def test_times_to_live_of_each_form() -> None:
    """EX, PX, EXAT, PXAT and KEEPTTL in any case, as text or bytes, and none at all."""
    assert lifetime_of(("EX", 5)) == lifetime_of((b"px", b"5000")) == lifetime_of(("NX", "ex", "5", "GET")) == 5.0
    assert lifetime_of(("EXAT", time.time() + 5)) == pytest.approx(5.0, abs=0.5)
    assert lifetime_of(("PXAT", time.time() * 1e3 + 5e3)) == pytest.approx(5.0, abs=0.5)
    assert lifetime_of(("KEEPTTL",)) != lifetime_of(("NX",)) == UNKNOWN


async def test_sizes(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """Payloads are what values weigh, read and written, once per command; misses and numbers weigh nothing."""

    def weighed(direction: str) -> tuple[float, float]:
        labels = {"cache": "main", "direction": direction}
        return value(writer, f"{BYTES}_count", **labels), value(writer, f"{BYTES}_sum", **labels)

    client.set("plan:1", b"x" * 5000, ex=60)
    client.mset({"plan:2": "y" * 20, "plan:3": 12345})
    client.hset("user:1", mapping={"name": "anna", "age": 7})
    assert weighed("write") == (3, 5000 + 25 + 5)
    client.get("plan:1"), client.get("plan:none"), client.mget("plan:1", "plan:2", "plan:none")
    assert weighed("read") == (2, 5000 + 5020)
    client.hgetall("user:1"), client.exists("plan:1"), client.strlen("plan:1")
    assert weighed("read") == (3, 5000 + 5020 + len("nameannaage7"))
    client.pipeline().get("plan:2").get("plan:3").set("plan:4", "z").execute()
    assert weighed("read") == (5, 5000 + 5020 + 12 + 25)
    assert weighed("write")[0] == 4


@pytest.mark.parametrize(
    ("reply", "size"),
    [
        (b"abc", 3), ("abc", 3), (None, 0), ([b"a", None, b"bc"], 3), ({"a": "bc", "d": "e"}, 5), ({b"a", b"bc"}, 3),
        ([(b"ab", 1.5)], 5), ({b"a": 12}, 3), ([], 0), ({}, 0), ([None], 0), (bytearray(b"ab"), 2), (True, 0), (12, 2),
        ([b"ab", 12], 4), (object(), 0),
    ],
)  # fmt: skip
def test_sizes_of_replies(reply: Any, size: int) -> None:
    """Strings, lists, sets, hashes and scores, in both protocols' forms."""
    assert size_of(reply) == size


async def test_time_outs(probe: CacheProbe, writer: Writer) -> None:
    """A server that does not answer in time is a time-out and an error, sync, async and in a pipeline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        sync_client: Any = redis.Redis(port=port, socket_timeout=0.05, retry=None, protocol=2)
        async_client: Any = redis.asyncio.Redis(port=port, socket_timeout=0.05, retry=None, protocol=2)
        probe.name_clients({"slow": sync_client, "later": async_client})
        with pytest.raises(redis.TimeoutError):
            sync_client.get("plan:1")
        with pytest.raises(redis.TimeoutError):
            sync_client.pipeline().get("plan:1").set("plan:1", "x").execute()
        with pytest.raises(redis.TimeoutError):
            await async_client.set("plan:1", "x")
        sync_client.close()
        await async_client.aclose()
    assert value(writer, "headroom_cache_timeouts_total", cache="slow") == 2
    assert value(writer, "headroom_cache_timeouts_total", cache="later") == 1
    assert results(writer, "slow") == {("plan:{}", "error"): 2}
    assert operations(writer, "slow") == {"get": 1, "pipeline": 1}
    assert "headroom_cache_timeouts_total" in {name for name, _ in writer.samples()}


def test_refused_connections_are_no_time_outs(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """An error of another kind is no time-out, and the counter is there with 0 from the first command on."""
    client.set("plan:1", "x")
    with pytest.raises(redis.ResponseError):
        client.hget("plan:1", "a")
    assert writer.value("headroom_cache_timeouts_total", cache="main") == 0
    assert results(writer) == {("plan:{}", "error"): 1}


def test_the_public_calls(probe: CacheProbe, writer: Writer) -> None:
    """An app says that it served what was out of date, how old it was, and what an event made it throw away."""
    headroom.cache_result("plans", True, "org:{}:plan")
    headroom.cache_result("plans", hit=False, key_pattern="org:{}:plan")
    headroom.cache_result("plans", hit=True, key_pattern="org:7:plan", stale=True, age=90.0)
    headroom.cache_result("plans", hit=True, key_pattern="org:{}:plan", age=10)
    headroom.cache_result("plans", hit=True, key_pattern="org:{}:plan", age=float("nan"))
    headroom.cache_invalidated("plans", key_pattern="org:17:plan", count=3)
    headroom.cache_invalidated("plans", key_pattern="org:{}:plan")
    headroom.cache_invalidated("plans", key_pattern="org:{}:plan", count=-5)
    assert results(writer, "plans") == {
        ("org:{}:plan", "hit"): 3, ("org:{}:plan", "miss"): 1, ("org:{}:plan", "stale"): 1,
    }  # fmt: skip
    assert value(writer, f"{AGES}_count", cache="plans") == 2
    assert value(writer, f"{AGES}_sum", cache="plans") == 100
    assert writer.value("headroom_cache_invalidations_total", cache="plans", key_pattern="org:{}:plan") == 4
    assert not [1 for (name, labels) in writer.samples() if name.startswith(BYTES) and ("cache", "plans") in labels]


def test_a_stale_entry_of_redis_counts_once(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """A read that the app calls stale is stale and no hit beside it: look-ups add up to the reads that were made."""
    client.set("org:1:plan", "x")
    for _ in range(5):
        client.get("org:1:plan")
    for _ in range(2):
        headroom.cache_result("main", hit=True, key_pattern="org:{}:plan", stale=True)
    for _ in range(5):
        client.get("org:1:plan")
    client.get("org:2:plan")
    headroom.cache_result("main", hit=False, key_pattern="org:{}:plan", stale=True)
    client.get("org:3:plan")
    client.get("org:4:plan")
    assert results(writer) == {
        ("org:{}:plan", "hit"): 8, ("org:{}:plan", "miss"): 2, ("org:{}:plan", "stale"): 3,
    }  # fmt: skip


def test_the_public_calls_never_raise(probe: CacheProbe, writer: Writer) -> None:
    """What makes no sense is swallowed and counted as an error of the probe; the app goes on."""
    headroom.cache_result("plans", hit=True, key_pattern="p", age="old")  # type: ignore[arg-type]
    assert writer.value("headroom_probe_errors_total", probe="cache") == 1
    probe.guard.bind(writer)


def test_the_public_calls_do_nothing_unbound() -> None:
    """Without a probe the calls cost nothing and do nothing."""
    headroom.cache_result("plans", hit=True, stale=True, age=1.0)
    headroom.cache_invalidated("plans")
