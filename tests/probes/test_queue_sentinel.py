"""Polling a Redis that sentinels watch: the master is found, and found again after a failover."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
import redis

from demo_app.stack.process import free_port
from fastapi_headroom import catalog
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.exporter.cache_servers import cache_poller_for
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.probes.queue_adapters.redis_link import PORT, RedisLink
from fastapi_headroom.probes.queue_adapters.url import parse
from tests.support.measured import eventually
from tests.support.redis_topologies import Sentinel, sentinel_and_master

EXAMPLE = "list+redis://host:6379/0?queues=mail"


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinel]:
    with sentinel_and_master(tmp_path_factory.mktemp("sentinel")) as sentinel:
        yield sentinel


def addresses(sentinel: Sentinel) -> str:
    """Return two addresses, at the first of which nobody answers."""
    return f"127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}"


def master_of(sentinel: Sentinel) -> int:
    """Return the port of the master, as the sentinel knows it."""
    with redis.Redis(port=sentinel.port) as client:
        return int(client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "shop")[1])


def test_queues_and_the_server_are_polled_at_the_master(sentinel: Sentinel) -> None:
    """Depth is that of the master's list, and the cache has the name that the app's own client has behind sentinels."""
    with redis.Redis(port=master_of(sentinel)) as client:
        client.rpush("mail", *"abc")
    queue = poller_for(f"list+redis://{addresses(sentinel)}/0?sentinel=shop&queues=mail")
    cache = cache_poller_for(f"redis://{addresses(sentinel)}/0?sentinel=shop")
    assert queue.name == "list+redis://shop/0"
    assert [value for metric, labels, value in queue.poll() if metric is catalog.QUEUE_DEPTH and "mail" in labels] == [
        3
    ]
    entries = [(labels, value) for metric, labels, value in cache.poll() if metric is catalog.CACHE_ENTRIES]
    assert entries == [(("shop/0",), 1)]
    queue.close()
    cache.close()


def test_a_poller_follows_the_failover(sentinel: Sentinel) -> None:
    """After a failover the polls go to the server that is the master now, with at most some that fail in between."""
    link = RedisLink(parse(f"list+redis://127.0.0.1:{sentinel.port}/0?sentinel=shop", EXAMPLE, PORT), EXAMPLE)
    before = master_of(sentinel)
    assert asked_port(link) == before
    with redis.Redis(port=sentinel.port) as client:
        client.execute_command("SENTINEL DEBUG", "info-period", "100")  # the servers are asked how they are that often

        def accepted() -> bool:
            with contextlib.suppress(redis.ResponseError):  # the replica may not be good enough yet
                client.execute_command("SENTINEL FAILOVER", "shop")
                return True
            return False

        eventually(accepted)
    eventually(lambda: master_of(sentinel) != before)

    def moved() -> bool:
        with contextlib.suppress(redis.RedisError):
            return asked_port(link) == master_of(sentinel) and link.get([("ROLE",)])[0][0] == b"master"
        return False

    eventually(moved)
    link.close()


def asked_port(link: RedisLink) -> int:
    """Return the port that the server at the other end listens at."""
    (told,) = link.get([("INFO", "server")])
    return int(re.findall(rb"tcp_port:(\d+)", told)[0])


def test_what_no_sentinel_knows_is_said(sentinel: Sentinel) -> None:
    """An unknown master's name, and sentinels that are down, are errors of the poll that say who was asked for what."""
    nobody = free_port()
    poller = poller_for(f"rq+redis://127.0.0.1:{nobody},127.0.0.1:{sentinel.port}/0?sentinel=other")
    with pytest.raises(redis.ConnectionError) as raised:
        poller.poll()
    assert f"127.0.0.1:{nobody}: " in str(raised.value)
    assert f"127.0.0.1:{sentinel.port} knows no master 'other'" in str(raised.value)
    poller.close()


@pytest.mark.parametrize(
    "url",
    [
        "rq+redis://:secret@a:26379/0?sentinel=",
        "rq+redis://:secret@a,b:x/0?sentinel=shop",
        "rq+redis://:secret@a,b/0?sentinel_password=secret",
        "celery+amqp://user:secret@a:5672/?queues=mail&sentinel=shop",
    ],
)
def test_urls_that_cannot_be_used(url: str) -> None:
    """They are refused with an example of what works, and without any part that may be secret."""
    with pytest.raises(SettingsError, match=r"looks like|as in|known are") as raised:
        poller_for(url)
    assert "secret" not in str(raised.value).replace("sentinel_password", "")


def test_the_sentinels_own_password_is_not_the_masters() -> None:
    """The one before the @ is for the master; sentinels get theirs by a parameter, and no text shows either."""
    url = "rq+redis://user:master@a:1,[::1]/2?sentinel=shop&sentinel_password=theirs"
    parsed = parse(url, EXAMPLE, PORT)
    assert parsed.sentinels is not None
    assert parsed.sentinels.addresses == (("a", 1), ("::1", 26_379))
    assert (parsed.broker, parsed.sentinels.password) == ("redis://user:master@localhost/2", "theirs")
    assert parsed.name == "rq+redis://shop/2"
    assert "theirs" not in repr(parsed)
