"""Polling cache servers: what a real Redis says of itself, and what becomes of it when it is down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pymemcache
import pytest
import redis

from demo_app.stack.process import free_port
from demo_app.stack.servers import Memcached, Redis
from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.exporter.cache_servers import SECTIONS, cache_poller_for, parse_info, samples
from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.pollers import PolledCache
from fastapi_headroom.probes.queue_adapters import Poller
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.exporter.support import eventually, serving_sidecar
from tests.exporter.test_collect import values
from tests.exporter.test_sidecar import sample

LIMIT = 4_000_000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A Redis that holds 4 MB and throws out what was used least lately."""
    options = {"maxmemory": str(LIMIT), "maxmemory-policy": "allkeys-lru", "enable-debug-command": "yes"}
    with Redis(tmp_path_factory.mktemp("small") / "redis", **options) as server:
        yield server


@pytest.fixture
def poll(small: Redis) -> Iterator[Callable[[], dict[tuple[Metric, tuple[str, ...]], float]]]:
    """Ask the small Redis for its rows, under the name ``main``."""
    poller = cache_poller_for(f"{small.url}?name=main")
    yield lambda: {(metric, labels): value for metric, labels, value in poller.poll()}
    poller.close()


def test_what_a_server_counts_is_what_happened(
    small: Redis, poll: Callable[[], dict[tuple[Metric, tuple[str, ...]], float]]
) -> None:
    """Hits, misses, expirations, keys and clients follow what was done to a real server, in any of its databases."""
    with redis.Redis(port=small.port) as client, redis.Redis(port=small.port, db=3) as other:
        client.flushall()
        client.set("a", 1)
        other.set("b", 1)
        before = poll()
        for _ in range(5):
            client.get("a")
        other.get("b")
        client.get("no such key")
        client.set("brief", 1, px=1)
        eventually(lambda: client.get("brief") is None, "the end of its time to live")
        after = poll()

    def grew(metric: Metric, *labels: str) -> float:
        return after[metric, ("main", *labels)] - before[metric, ("main", *labels)]

    assert grew(catalog.CACHE_SERVER_LOOKUPS, "hit") >= 6
    assert grew(catalog.CACHE_SERVER_LOOKUPS, "miss") >= 2
    assert grew(catalog.CACHE_EXPIRATIONS) == 1
    assert after[catalog.CACHE_ENTRIES, ("main",)] == 2
    assert after[catalog.CACHE_CLIENTS, ("main",)] >= 3
    assert after[catalog.CACHE_CLIENTS_LIMIT, ("main",)] == 10_000
    assert after[catalog.CACHE_SERVER_INFO, ("main", "redis", after_version(small), "allkeys-lru")] == 1


def after_version(server: Redis) -> str:
    with redis.Redis(port=server.port) as client:
        return str(client.info("server")["redis_version"])


def test_a_full_server_shows_its_limit_and_what_it_throws_out(
    small: Redis, poll: Callable[[], dict[tuple[Metric, tuple[str, ...]], float]]
) -> None:
    """Written beyond its memory, evictions count the keys that are gone and memory stays about the limit."""
    with redis.Redis(port=small.port) as client:
        client.flushall()
        before = poll()[catalog.CACHE_EVICTIONS, ("main",)]
        with client.pipeline(transaction=False) as pipeline:
            for number in range(6_000):
                pipeline.set(f"key:{number}", "x" * 1_000)
            pipeline.execute()
        first = poll()[catalog.CACHE_EVICTIONS, ("main",)] - before
        gone = 6_000 - client.dbsize()
        rows = poll()  # asking takes memory, so more may have gone
    assert 0 < first <= gone <= rows[catalog.CACHE_EVICTIONS, ("main",)] - before
    assert rows[catalog.CACHE_MEMORY_LIMIT, ("main",)] == LIMIT
    assert 0.8 * LIMIT < rows[catalog.CACHE_MEMORY, ("main",)] < 1.2 * LIMIT


def test_a_server_without_a_limit_has_no_series_of_it(redis_server: Redis) -> None:
    """No limit is no series, not a limit of 0; the name is that which the app's clients get by themselves."""
    poller = cache_poller_for(redis_server.url)
    rows = {metric: labels for metric, labels, _ in poller.poll()}
    poller.close()
    assert catalog.CACHE_MEMORY_LIMIT not in rows
    assert rows[catalog.CACHE_MEMORY] == (f"127.0.0.1:{redis_server.port}/0",)


def test_a_poll_costs_the_same_however_much_the_server_holds(small: Redis) -> None:
    """With 200,000 keys a poll takes less than a millisecond of the server's time, as it tells itself."""
    with redis.Redis(port=small.port) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        client.execute_command("DEBUG", "POPULATE", 200_000)
        client.config_resetstat()
        poller = cache_poller_for(small.url)
        for _ in range(20):
            poller.poll()
        poller.close()
        cost = client.info("commandstats")["cmdstat_info"]
        client.flushall()
        client.config_set("maxmemory", LIMIT)
    assert cost["calls"] == 20 * len(SECTIONS)
    assert cost["usec"] / 20 < 1_000


def test_a_server_that_is_down_is_a_gap_beside_what_workers_tell(tmp_path: Path) -> None:
    """Down, it has no series and the cache probe is 0; what the workers' caches tell of themselves stays."""
    port = free_port()
    writer = Writer.open(tmp_path / "store")
    writer.gauge(catalog.PROBE_UP, "cache").set(1)
    writer.gauge(catalog.CACHE_ENTRIES, "shop.plans").set(7)
    polled = PolledCache(f"redis://127.0.0.1:{port}/0?name=main", interval=0.05)
    collector = Collector(Reader(tmp_path / "store"), caches=[polled])
    up, ours = "headroom_probe_up cache", "headroom_cache_entries shop.plans"
    with Redis(tmp_path / "first", port=port):
        polled.start()
        eventually(lambda: polled.up is True, "the first answer")
        seen = values(collector.collect())
        assert (seen[up], seen[ours], seen["headroom_cache_entries main"]) == (1.0, 7.0, 0.0)
        assert seen["headroom_cache_memory_bytes main"] > 0
    eventually(lambda: polled.up is False, "the failure")
    seen = values(collector.collect())
    assert (seen[up], seen[ours]) == (0.0, 7.0)
    assert not [name for name in seen if name.endswith(" main")]
    with Redis(tmp_path / "second", port=port):
        eventually(lambda: polled.up is True, "the recovery")
    polled.stop()


def test_the_sidecar_polls_the_caches_that_it_is_given(tmp_path: Path, redis_server: Redis) -> None:
    """``headroom sidecar --cache URL`` exports the server's memory under the name that the URL gives."""
    port = free_port()
    with serving_sidecar(tmp_path / "store", port, "--cache", f"{redis_server.url}?name=main"):
        eventually(lambda: (sample(port, 'headroom_cache_memory_bytes{cache="main"}') or 0) > 0, "the memory")
        assert sample(port, 'headroom_probe_up{probe="cache"}') == 1.0


@pytest.mark.parametrize("flags", [(), ("-M",)], ids=["evicts", "refuses"])
def test_a_memcached_tells_the_same(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Look-ups, entries and limits of a real memcached follow what was done to it, and what it does when it is full."""
    with Memcached(tmp_path / "memcached") as server:
        server.stop()
        server.command += flags
        server.start()
        client = pymemcache.Client(("127.0.0.1", server.port))
        client.set("a", "x" * 100, noreply=False)
        client.get_many(["a", "b", "c"])
        poller = cache_poller_for(f"memcached://127.0.0.1:{server.port}?name=sessions")
        rows = {(metric, labels): value for metric, labels, value in poller.poll()}
        client.close()
    assert rows[catalog.CACHE_SERVER_LOOKUPS, ("sessions", "hit")] == rows[catalog.CACHE_ENTRIES, ("sessions",)] == 1
    assert rows[catalog.CACHE_SERVER_LOOKUPS, ("sessions", "miss")] == 2
    assert rows[catalog.CACHE_EVICTIONS, ("sessions",)] == 0
    assert 100 < rows[catalog.CACHE_MEMORY, ("sessions",)] < rows[catalog.CACHE_MEMORY_LIMIT, ("sessions",)] == 64 << 20
    (about,) = (labels for metric, labels in rows if metric is catalog.CACHE_SERVER_INFO)
    assert about[1] == "memcached" and about[3] == ("noeviction" if flags else "lru")
    with pytest.raises(OSError):
        poller.poll()


def test_an_unusable_url_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with a URL, the error and the log keep its credentials."""
    for url in (
        "memcache://app:s3cret@host:1/0",
        "memcached://app:s3cret@host:99999999",
        "memcached://app:s3cret@host?nam=main",
        "redis://app:s3cret@host:99999999/0",
        "redis://app:s3cret@host:6379/0?nam=main",
        "redis://app:s3cret@host:6379/no-database",
    ):
        with pytest.raises(SettingsError) as error:
            cache_poller_for(url)
        assert "s3cret" not in str(error.value) and "?name=" in str(error.value)
    polled = PolledCache(f"redis://app:s3cret@127.0.0.1:{free_port()}/0", interval=0.05)
    polled.start()
    eventually(lambda: polled.up is False, "the failure")
    polled.stop()
    assert "HEADROOM_CACHE_SERVERS" in caplog.text and "s3cret" not in caplog.text


def test_odd_answers_make_no_rows() -> None:
    """Fields that are missing or no numbers, as forks of Redis have them, give no series: never 0 for unknown."""
    assert samples("main", {}) == []
    facts = parse_info(b"# Memory\r\nused_memory:12\r\nmaxmemory:unlimited\r\nnonsense\r\n\xff\xfe:x\r\n")
    assert samples("main", facts) == [(catalog.CACHE_MEMORY, ("main",), 12.0)]
    named = parse_info(b"redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.0.1\r\n")
    assert samples("main", named) == [(catalog.CACHE_SERVER_INFO, ("main", "valkey", "8.0.1", ""), 1.0)]


def test_a_poller_is_one_of_the_exporters() -> None:
    """A cache server's poller keeps the contract of queue pollers, so that the exporter treats them alike."""
    poller: Poller = cache_poller_for("redis://app:s3cret@host:6379/1")
    assert poller.name == "host:6379/1"
    poller.close()
