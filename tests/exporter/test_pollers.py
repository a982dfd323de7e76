"""Polling brokers beside the scrape."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import pytest
import redis

from demo_app.stack.process import free_port
from demo_app.stack.servers import Redis
from fastapi_headroom import catalog
from fastapi_headroom.exporter import pollers
from fastapi_headroom.exporter.pollers import PolledCache, PolledQueue, public
from tests.exporter.support import Broker, eventually, polled

ROW = (catalog.QUEUE_DEPTH, ("redis", "mail", "0"), 5.0)


def depth(queue: PolledQueue) -> float | None:
    return next(
        (value for metric, labels, value in queue.rows() if metric is catalog.QUEUE_DEPTH and "0" in labels), None
    )


def test_a_real_broker_goes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Depth follows a real Redis; while it is down there is a gap and one line, and it comes back by itself."""
    port = free_port()
    queue = PolledQueue(f"celery+redis://127.0.0.1:{port}/0?queues=mail", interval=0.05)
    with Redis(tmp_path / "first", port=port):
        with redis.Redis(port=port) as client:
            client.lpush("mail", "{}", "{}", "{}")
        queue.start()
        eventually(lambda: depth(queue) == 3.0, "the depth")
    eventually(lambda: queue.up is False, "the failure")
    assert queue.rows() == []
    with Redis(tmp_path / "second", port=port):
        eventually(lambda: depth(queue) == 0.0, "the recovery")
        queue.stop()
    lines = [record.getMessage() for record in caplog.records if record.name == "fastapi_headroom"]
    (down,) = [line for line in lines if "cannot be polled" in line]
    assert f"celery+redis://127.0.0.1:{port}/0 " in down
    assert "HEADROOM_QUEUES" in down
    assert sum("answers again" in line for line in lines) == 1


def test_a_failure_is_logged_once_and_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    """However often a poll fails there is one line, and neither user nor password is in it."""
    failures = threading.Semaphore(0)

    class Failing(Broker):
        def poll(self) -> list[pollers.Sample]:
            failures.release()
            raise ConnectionError("no route to redis://app:s3cr%3At@broker, password s3cr:t, sentinels' 0ther")

    queue = PolledQueue(
        "celery+redis://app:s3cr%3At@broker:6379/0?sentinel=a&sentinel_password=0ther",
        lambda _: Failing(),
        interval=0.01,
    )
    with caplog.at_level(logging.DEBUG, "fastapi_headroom"):
        queue.start()
        for _ in range(5):
            assert failures.acquire(timeout=5)
        queue.stop()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "celery+redis://broker:6379/0" in line
    assert "s3cr" not in line
    assert "0ther" not in line
    assert "app" not in line.replace("fastapi-headroom", "")


def test_a_url_that_cannot_be_used_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A scheme that no adapter knows is one clear line, not a crash."""
    queue = PolledQueue("carrier-pigeon://loft", interval=0.01)
    queue.start()
    eventually(lambda: queue.up is False, "the failure")
    queue.stop()
    assert "celery+redis" in caplog.text
    assert "until HEADROOM_QUEUES or --queue is right" in caplog.text
    assert "check that it runs" not in caplog.text


def test_a_library_that_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sidecar without redis-py says which extra to install, and does not send anybody to look at the server."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("redis", "redis.backoff"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    polled_twice = [PolledQueue("rq+redis://broker/0", interval=0.01), PolledCache("redis://broker/0", interval=0.01)]
    for one in polled_twice:
        one.start()
        eventually(lambda one=one: one.up is False, "the failure")
        one.stop()
    queue, cache = (record.getMessage() for record in caplog.records)
    for line in (queue, cache):
        assert "needs redis, which is not installed: run `pip install 'fastapi-headroom[redis]'`" in line
        assert "check that it runs" not in line
    assert "queue" not in cache


def test_a_poll_that_hangs_becomes_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that neither answers nor fails is down once its last result is stale."""
    monkeypatch.setattr(pollers, "FRESH", 1.0)
    hang = threading.Event()

    class Hanging(Broker):
        polls = 0

        def poll(self) -> list[pollers.Sample]:
            self.polls += 1
            if self.polls > 1:
                hang.wait(60)
            return [ROW]

    queue = polled(Hanging())
    assert queue.rows() == [ROW]
    eventually(lambda: queue.up is False, "staleness")
    assert queue.rows() == []
    hang.set()
    eventually(lambda: queue.rows() == [ROW], "the recovery")
    queue.stop()


def test_stopping_closes_the_brokers_connection() -> None:
    """A poller that is stopped is closed by its own thread."""
    broker = Broker(ROW)
    polled(broker).stop()
    eventually(lambda: broker.closed, "the close")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("celery+redis://u:p@h:6379/0?queues=a&token=t#f", "celery+redis://h:6379/0"),
        ("redis://:p@[::1]:6379/1", "redis://[::1]:6379/1"),
        ("rq+redis://u:p,w@a:26379,[::1]:1,b/0?sentinel=shop&sentinel_password=q", "rq+redis://a:26379,[::1]:1,b/0"),
        ("redis://h:port/1", "(a URL that cannot be parsed)"),
        ("redis://a:1,h:port/1", "(a URL that cannot be parsed)"),
        ("redis://[h", "(a URL that cannot be parsed)"),
    ],
)
def test_a_logged_url_has_no_secrets(url: str, shown: str) -> None:
    """User, password, query and fragment stay out of logs."""
    assert public(url) == shown
