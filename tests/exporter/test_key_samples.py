"""What a few random keys tell of a real Redis: patterns, sizes, idle times and ends, at a bounded cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import redis

from demo_app.stack.servers import Redis
from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.exporter import key_samples
from fastapi_headroom.exporter.cache_servers import cache_poller_for
from fastapi_headroom.exporter.key_samples import expires

Rows = dict[tuple[Metric, tuple[str, ...]], float]
SECRET = "Zx81qK07vv93hd55"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("sampled") / "redis", **{"enable-debug-command": "yes"}) as server:
        yield server


@pytest.fixture
def client(server: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    monkeypatch.setattr(key_samples, "PERIOD", 0.0)  # each poll looks
    with redis.Redis(port=server.port) as client:
        client.flushall()
        client.config_set("maxmemory-policy", "noeviction")
        yield client


def polled(server: Redis, times: int, keys: int = 50) -> Rows:
    poller = cache_poller_for(f"{server.url}?name=main&sample={keys}")
    for _ in range(times):
        rows = poller.poll()
    poller.close()
    return {(metric, labels): value for metric, labels, value in rows if "sampled" in metric.name}


def test_a_pattern_that_never_expires_and_fills_the_memory_is_found(
    server: Redis, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two patterns, ends and sizes are those of the keys that were written; no key is in a label or a log."""
    caplog.set_level(logging.DEBUG)
    for number in range(100):
        client.set(f"report:{SECRET}{number}", "x" * 10_000)
        client.set(f"session:{number}:{SECRET}", "x", ex=30 if number % 2 else 40_000)
    rows = polled(server, 10)
    keys = {labels[1:]: value for (metric, labels), value in rows.items() if metric is catalog.CACHE_SAMPLED_KEYS}
    assert sum(keys.values()) == 500
    assert set(keys) == {
        ("report:{}", "never"), ("session:{}:{}", "within_minute"), ("session:{}:{}", "within_day")
    }  # fmt: skip
    size = rows[catalog.CACHE_SAMPLED_BYTES, ("main", "report:{}")] / keys["report:{}", "never"]
    assert 10_000 < size < 14_000
    assert rows[catalog.CACHE_SAMPLED_IDLE, ("main", "report:{}")] >= 0
    assert SECRET not in f"{rows} {caplog.text}"


def test_what_the_server_does_not_tell_has_no_series(server: Redis, client: redis.Redis) -> None:
    """An empty database makes no row, and a server that counts uses tells no idle time."""
    assert polled(server, 2) == {}
    client.config_set("maxmemory-policy", "allkeys-lfu")
    client.set("a:1", 1)
    assert {metric for metric, _ in polled(server, 1)} == {catalog.CACHE_SAMPLED_KEYS, catalog.CACHE_SAMPLED_BYTES}


def test_a_look_costs_the_same_however_much_the_server_holds(server: Redis, client: redis.Redis) -> None:
    """Of 200,000 keys, a look at twenty takes less than a millisecond of the server's time, as it tells itself."""
    client.execute_command("DEBUG", "POPULATE", 200_000)
    client.config_resetstat()
    polled(server, 20, keys=20)
    stats = client.info("commandstats")
    assert client.info("stats")["keyspace_hits"] == 800  # two a key, as the docs say
    commands = ("randomkey", "pttl", "memory|usage", "object|idletime")
    assert [stats[f"cmdstat_{name}"]["calls"] for name in commands] == [400] * 4
    cost = sum(stats[f"cmdstat_{name}"]["usec"] for name in commands) / 20
    print(f"{cost:.0f} us of the server's time per look")
    assert cost < 1_000


def test_patterns_are_bounded(server: Redis, client: redis.Redis) -> None:
    """However many kinds of keys there are, a hundred patterns have series and the rest share one."""
    client.mset({f"{a}{b}:{c}{a}": 1 for a in "abcde" for b in "klmnopqr" for c in "stuvwxyz"})
    patterns = {labels[1] for _, labels in polled(server, 40, keys=100)}
    assert "_OTHER" in patterns
    assert len(patterns) <= key_samples.MAX_PATTERNS + 1


@pytest.mark.parametrize("sample", ["-1", "101", "many", ""])
def test_a_sample_is_a_small_number(sample: str) -> None:
    """A number of keys that cannot be used is refused when the exporter starts."""
    with pytest.raises(SettingsError, match="from 0 to 100"):
        cache_poller_for(f"redis://localhost/0?sample={sample}")


@pytest.mark.parametrize(
    ("left", "label"),
    [(-1, "never"), (0, "within_minute"), (60_000, "within_minute"), (60_001, "within_hour"),
     (86_400_000, "within_day"), (86_400_001, "later")],
)  # fmt: skip
def test_ends_fall_into_five(left: int, label: str) -> None:
    """The time left in milliseconds makes one of five labels."""
    assert expires(left) == label
