"""What single pollers promise beyond the kit: odd states of their brokers, wrong URLs, and the price of a poll."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import redis as redis_client

from demo_app.stack.servers import Redis
from fastapi_headroom import catalog
from fastapi_headroom.errors import MissingExtraError, SettingsError
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.probes.queue_adapters.redis_streams import COUNTED

DEPTH, AGE, BUSY = catalog.QUEUE_DEPTH.name, catalog.QUEUE_OLDEST_AGE.name, catalog.QUEUE_IN_PROGRESS.name
MILLION = 1_000_000
FILLING = {
    "list": "for i = 1, ARGV[1] do redis.call('LPUSH', 'mail', '{\"enqueued_at\": 1}') end",
    "celery": "for i = 1, ARGV[1] do redis.call('LPUSH', 'mail', '{\"headers\": {\"headroom_enqueued_at\": 1}}') end",
    "stream": "redis.call('XGROUP', 'CREATE', 'mail', 'g', '0', 'MKSTREAM') "
    "for i = 1, ARGV[1] do redis.call('XADD', 'mail', '*', 'job', '1') end",
    "rq": "redis.call('SADD', 'rq:queues', 'rq:queue:mail') for i = 1, ARGV[1] do "
    "redis.call('RPUSH', 'rq:queue:mail', 'job' .. i) "
    "redis.call('ZADD', 'rq:scheduled:mail', 4e9 + i, 'later' .. i) end "
    "redis.call('HSET', 'rq:job:job1', 'enqueued_at', '2026-01-01T00:00:00.000000Z')",
    "dramatiq": "for i = 1, ARGV[1] do redis.call('RPUSH', 'dramatiq:mail', 'id' .. i) end "
    "redis.call('HSET', 'dramatiq:mail.msgs', 'id1', '{\"message_timestamp\":1700000000000}')",
    "taskiq": "for i = 1, ARGV[1] do redis.call('LPUSH', 'mail', '{\"labels\": {\"headroom_ready_at\": \"1\"}}') end",
    # behind as many running ones as are looked at
    "arq": "for i = 1, ARGV[1] + 499 do redis.call('ZADD', 'mail', i, 'job' .. i) end "
    "for i = 1, 499 do redis.call('SET', 'arq:in-progress:job' .. i, '1') end",
}
ALLOWED = {"llen", "lindex", "hlen", "hget", "zcard", "zcount", "zrange", "scard", "smembers", "exists"}
ALLOWED |= {"xinfo|groups", "xlen", "xrange"}
ALLOWED |= {"multi", "mget", "exec", "type"}
"""O(1), O(log n), or of as many steps as there are groups, queues, workers or running jobs, all few."""
BESIDE = {"config|resetstat", "info", "client|setinfo", "hello"}


@pytest.fixture
def broker(redis_server: Redis) -> Iterator[redis_client.Redis]:
    """An empty Redis."""
    with redis_client.Redis.from_url(redis_server.url, socket_timeout=60) as client:
        client.flushall()
        yield client
        client.flushall()


def poll(url: str) -> dict[tuple[str, ...], float]:
    """Return one poll's values by metric name and destination."""
    return {(metric.name, labels[1]): value for metric, labels, value in poller_for(url).poll()}


@pytest.mark.parametrize("kind", FILLING)
def test_a_poll_of_a_million_jobs_takes_the_broker_less_than_a_millisecond(
    broker: redis_client.Redis, redis_server: Redis, kind: str
) -> None:
    """By Redis' own account a poll of a million jobs costs it under 1 ms in all, and no command that counts jobs."""
    broker.eval(FILLING[kind], 0, MILLION)
    parameters = "queues=mail" + ("&timestamp=enqueued_at" if kind == "list" else "")
    poller = poller_for(f"{kind}+{redis_server.url}?{parameters}")
    depths = [value for metric, _, value in poller.poll() if metric is catalog.QUEUE_DEPTH]
    assert sum(depths) == MILLION
    costs = []
    for _ in range(20):
        broker.config_resetstat()
        poller.poll()
        stats = {name.removeprefix("cmdstat_"): row["usec"] for name, row in broker.info("commandstats").items()}
        used = {name: microseconds for name, microseconds in stats.items() if name not in BESIDE}
        assert used.keys() <= ALLOWED
        costs.append(sum(used.values()))
    cost = statistics.median(costs)  # Redis tells the time that passed, also while others had the processor
    print(f"{kind}: {cost:.1f} us of Redis per poll of {MILLION:,} jobs: {sorted(used)}")
    assert cost < 1_000


def test_a_stream_whose_lag_redis_does_not_know_is_counted_up_to_a_bound(
    broker: redis_client.Redis, redis_server: Redis
) -> None:
    """Where entries were deleted a small backlog is counted one by one, and a large one has an age and no depth."""
    entries = [broker.xadd("mail", {"n": n}) for n in range(COUNTED + 2)]
    broker.xgroup_create("mail", "g", id="0")
    broker.xreadgroup("g", "one", {"mail": ">"}, count=1)
    broker.xdel("mail", entries[50])
    (group,) = broker.xinfo_groups("mail")
    assert group["lag"] is None
    url = f"stream+{redis_server.url}?queues=mail"
    assert poll(url)[DEPTH, "mail/g"] == COUNTED
    broker.xadd("mail", {"n": "one too many"})
    values = poll(url)
    assert (DEPTH, "mail/g") not in values
    assert values[AGE, "mail/g"] > 0.0
    assert values[BUSY, "mail/g"] == 1.0


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_entries_that_were_trimmed_away_are_no_backlog(
    broker: redis_client.Redis, redis_server: Redis, kept: int
) -> None:
    """A stream that is kept short counts what a group can still read, though Redis counts more in its lag."""
    for n in range(10):
        broker.xadd("mail", {"n": n})
    broker.xgroup_create("mail", "g", id="0")
    broker.xreadgroup("g", "one", {"mail": ">"}, count=4)
    broker.xtrim("mail", maxlen=kept, approximate=False)
    values = poll(f"stream+{redis_server.url}?queues=mail")
    assert values[DEPTH, "mail/g"] == min(kept, 6)
    assert (values[AGE, "mail/g"] > 0.0) == (kept > 0)


def test_each_group_of_a_stream_has_its_own_backlog(broker: redis_client.Redis, redis_server: Redis) -> None:
    """Two groups that read the same entries at their own pace are two queues; a stream that is not there is none."""
    broker.xgroup_create("mail", "fast", id="0", mkstream=True)
    broker.xgroup_create("mail", "slow", id="0")
    for n in range(3):
        broker.xadd("mail", {"n": n})
    broker.xreadgroup("fast", "one", {"mail": ">"}, count=2)
    values = poll(f"stream+{redis_server.url}?queues=mail,none")
    assert (values[DEPTH, "mail/fast"], values[BUSY, "mail/fast"]) == (1.0, 2.0)
    assert (values[DEPTH, "mail/slow"], values[BUSY, "mail/slow"]) == (3.0, 0.0)
    assert not any(name.startswith("none") for _, name in values)


def test_a_key_of_another_kind_is_an_error(broker: redis_client.Redis, redis_server: Redis) -> None:
    """A list that is polled as a stream, or the other way round, is an error and no depth of 0."""
    broker.lpush("list", "{}")
    broker.xadd("stream", {"n": 1})
    for url in (f"stream+{redis_server.url}?queues=list", f"list+{redis_server.url}?queues=stream"):
        with pytest.raises(redis_client.ResponseError, match="WRONGTYPE"):
            poll(url)


@pytest.mark.parametrize(
    ("items", "age"),
    [
        ([], 0.0),
        (['{"at": %s}'], 5.0),
        (['{"at": %s}', '{"at": 99999999999}'], 5.0),
        (['{"at": 99999999999}', '{"at": %s}'], 5.0),
        (["not JSON"], None),
        (['{"other": 1}'], None),
        (['{"at": true}'], None),
        (['["at"]'], None),
        (['{"at": "%date"}'], 5.0),
    ],
)
def test_a_lists_age_comes_from_its_items(
    broker: redis_client.Redis, redis_server: Redis, items: list[str], age: float | None
) -> None:
    """The older end of a list tells its age whichever end is pushed; items that tell no time give no series."""
    put = time.time() - 5
    date = datetime.fromtimestamp(put, UTC).isoformat().replace("+00:00", "Z")
    for item in items:
        broker.lpush("mail", item.replace("%s", str(put)).replace("%date", date))
    values = poll(f"list+{redis_server.url}?queues=mail&timestamp=at")
    assert values[DEPTH, "mail"] == len(items)
    assert values.get((AGE, "mail")) == (pytest.approx(age, abs=1.0) if isinstance(age, float) else age)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("rq+redis://user:secret/@host/0", "it looks like rq+redis://host:6379/0"),
        ("rq+redis://user:secret@host/0?queue=mail", "known are queues"),
        ("list+redis://user:secret@host/0", "names no queue; it looks like list+redis://"),
        ("stream+redis://user:secret@host/0?timestamp=at", "unknown parameter 'timestamp'"),
        ("celery+amqp://user:secret@host/", "names no queue; it looks like celery+amqp://"),
        ("celery+amqp://user:secret@host:port/?queues=mail", "no usable host and port"),
        ("arq+redis://user:secret/@host/0", "it looks like arq+redis://host:6379/0"),
        ("dramatiq+redis://user:secret@host/0", "names no queue; it looks like dramatiq+redis://"),
        ("dramatiq+amqp://user:secret@host/", "names no queue; it looks like dramatiq+amqp://"),
        ("taskiq+redis://user:secret@host/0?groups=a", "known are queues, group"),
        ("taskiq+amqp://user:secret@host/", "names no queue; it looks like taskiq+amqp://"),
    ],
)
def test_a_url_that_cannot_be_used_names_the_remedy(url: str, remedy: str) -> None:
    """A wrong queue URL is one clear error that shows how it should look and holds no credentials."""
    with pytest.raises(SettingsError, match=re.escape(remedy)) as caught:
        poller_for(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("library", ["celery", "dramatiq", "taskiq"])
def test_polling_rabbitmq_without_its_client_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the AMQP client the error says which extra brings it."""
    monkeypatch.setitem(sys.modules, "amqp", None)
    with pytest.raises(MissingExtraError, match=rf"fastapi-headroom\[{library}\]"):
        poller_for(f"{library}+amqp://host/?queues=mail")
