"""Dramatiq on a real Redis: what publishers and workers measure, and what a message tells of its age."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.broker import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.encoder import JSONEncoder, PickleEncoder
from dramatiq.errors import ConnectionClosed
from dramatiq.worker import ConsumerThread, WorkerThread

import fastapi_headroom as headroom
from demo_app.stack.process import wait_until
from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.probes.queue_adapters.dramatiq import READY_AT, ready_since
from fastapi_headroom.probes.queue_adapters.dramatiq_hooks import TRACE
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support import dramatiq_app
from tests.support.dramatiq_subjects import DramatiqOnRedis
from tests.support.queue_series import MAIL, PUBLISHED, PUBLISHING, RETRIES, RUNS, WAITS, count
from tests.support.traced import traced


@pytest.fixture
def subject(redis_server: Redis, tmp_path: Path) -> DramatiqOnRedis:
    """An empty queue."""
    made = DramatiqOnRedis(redis_server, tmp_path)
    made.start()
    return made


@contextlib.contextmanager
def worker(subject: DramatiqOnRedis) -> Iterator[None]:
    """Run Dramatiq's worker on threads of this process."""
    subject.library.emit_after("process_boot")  # as its command does: time limits begin here
    made = dramatiq.Worker(subject.library, worker_threads=1, worker_timeout=50)
    made.start()
    try:
        yield
    finally:
        made.stop(timeout=2_000)


def state(subject: DramatiqOnRedis) -> dict[str, float]:
    """Return one poll's values by metric name."""
    return {metric.name: value for metric, _, value in poller_for(subject.url).poll()}


def test_a_worker_measures_waits_runs_failures_retries_and_time_limits(
    subject: DramatiqOnRedis, measured: Writer
) -> None:
    """Each outcome of a run has its error type; what is put back is a retry, and what failed for good a dead letter."""
    subject.publish(2)
    subject.publish(kind="again")
    subject.publish(kind="fail")
    dramatiq_app.sleep.send(30)
    dramatiq_app.old.send()
    time.sleep(0.3)

    def runs(actor: str, error: str) -> float:
        return count(measured, f"{RUNS}_count", **MAIL, headroom_task=actor, error_type=error)

    with worker(subject):
        wait_until(lambda: count(measured, f"{RUNS}_count") == 8.0, 60, "eight runs: 2 + 3 + 1 + 1 + 1")
        wait_until(lambda: state(subject)["headroom_queue_in_progress"] == 0.0, 60, "the last acknowledgement")
    assert (runs("kit", ""), runs("kit", "ConnectionError"), runs("kit", "ValueError")) == (3.0, 2.0, 1.0)
    assert (runs("sleep", "TimeLimitExceeded"), runs("old", "SkipMessage")) == (1.0, 1.0)
    assert 0.2 <= count(measured, f"{RUNS}_sum", headroom_task="sleep") < 5.0
    assert count(measured, RETRIES, **MAIL) == count(measured, RETRIES, headroom_task="kit") == 2.0
    assert count(measured, f"{WAITS}_count", **MAIL) == 8.0
    assert count(measured, f"{WAITS}_sum", **MAIL) >= 0.3 * 6
    assert state(subject)["headroom_queue_failed"] == 3.0


def test_a_delay_is_no_wait_and_its_end_no_publishing(subject: DramatiqOnRedis, measured: Writer) -> None:
    """A message that is sent with a delay waits from when it is due, and is published once."""
    subject.publish_later(2.5)
    assert state(subject)["headroom_queue_delayed"] == 1.0
    with worker(subject):
        wait_until(lambda: count(measured, f"{RUNS}_count") == 1.0, 60, "the run")
    assert count(measured, f"{WAITS}_sum") < 2.0
    assert count(measured, f"{PUBLISHING}_count") == 1.0


def test_publishing_is_timed_and_charged_to_the_request(subject: DramatiqOnRedis, measured: Writer) -> None:
    """Handing a message over is counted by queue and is the publish stage of the request's ledger, and no other."""
    request = ledger.Ledger("POST")
    token = ledger.current.set(request)
    try:
        subject.publish()
    finally:
        ledger.current.reset(token)
    spent = measured.value(f"{PUBLISHING}_sum", **PUBLISHED)
    assert measured.value(f"{PUBLISHING}_count", **PUBLISHED) == 1.0
    assert request.seconds[ledger.PUBLISH] == pytest.approx(spent, rel=0.3, abs=0.002)
    assert request.seconds[ledger.CACHE] == 0.0


def test_a_failed_publish_raises_what_it_raised_before(measured: Writer) -> None:
    """Without a broker the app sees the same error as before, and the time it took is counted."""
    broker = RabbitmqBroker(url="amqp://127.0.0.1:1/%2F", middleware=[])
    message = dramatiq.Message("mail", "kit", (), {}, {})
    with pytest.raises(ConnectionClosed):
        broker.enqueue(message)
    labels = PUBLISHED | {"messaging_system": "rabbitmq"}
    assert measured.value(f"{PUBLISHING}_count", **labels) == 1.0
    assert message.options == {}, "the app's own message is left as it was"


def test_a_request_and_the_runs_of_its_message_are_one_trace(subject: DramatiqOnRedis, measured: Writer) -> None:
    """A message carries the trace context through delay and retries; each run is a consumer span."""
    with traced() as traces:
        with traces.tracer.start_as_current_span("request"):
            dramatiq_app.kit.send_with_options(args=(str(subject.folder), "again"), delay=20)
        with worker(subject):
            wait_until(lambda: count(measured, f"{RUNS}_count") == 3.0, 60, "three tries")
        traces.assert_runs("request", attempts=3)
    subject.publish()
    assert TRACE not in json.loads(subject.client.hvals("dramatiq:mail.msgs")[0])["options"]


def test_close_puts_all_back() -> None:
    """The probe attaches once and leaves nothing behind."""

    def patched() -> tuple[Any, ...]:
        return (RedisBroker.enqueue, RabbitmqBroker.enqueue, WorkerThread.process_message,
                ConsumerThread.handle_delayed_messages, Broker.emit_after)  # fmt: skip

    before = patched()
    probe = QueueProbe(load({}))
    probe.bind(Writer.in_memory())
    wrapped = patched()
    assert not set(before) & set(wrapped)
    probe.bind(Writer.in_memory())
    assert patched() == wrapped
    probe.close()
    probe.close()
    assert patched() == before


def test_a_broker_that_a_web_app_imports_too_starts_nothing_there(subject: DramatiqOnRedis) -> None:
    """``init_worker(broker)`` waits for Dramatiq to start a worker, and a second call adds no second middleware."""
    first = headroom.init_worker(subject.library, exporter=False)
    try:
        installed = len(subject.library.middleware)
        headroom.init_worker(subject.library)
        assert len(subject.library.middleware) == installed
        assert first.writer is None
    finally:
        first.shutdown()


@pytest.mark.parametrize("size", [0, 200_000])
@pytest.mark.parametrize(
    ("options", "age"),
    [
        ({}, 50.0),
        ({"requeue_timestamp": 20}, 20.0),
        ({READY_AT: 5}, 5.0),
        ({READY_AT: 5, "requeue_timestamp": 20}, 5.0),
    ],
)
def test_a_message_tells_its_age(options: dict[str, int], age: float, size: int) -> None:
    """The age is by our option, else by Dramatiq's last timestamp; arguments that look like them are not believed."""
    now = time.time()
    decoy = {READY_AT: 1.0, "message_timestamp": 1_000_000_000_000, "text": f'"{READY_AT}":1.0'}
    stamps = {name: now - ago if name == READY_AT else int((now - ago) * 1000) for name, ago in options.items()}
    message = dramatiq.Message(
        "mail", "kit", (decoy,), {**decoy, "large": "x" * size}, stamps, message_timestamp=int((now - 50) * 1000)
    )
    data = JSONEncoder().encode(message.asdict())
    ready = ready_since(data)
    assert ready is not None
    assert now - ready == pytest.approx(age, abs=0.01)


def test_a_message_that_does_not_tell_is_aged_from_its_first_sight(
    subject: DramatiqOnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickled message ages from the first poll that finds it the oldest."""
    monkeypatch.setattr(dramatiq.message, "global_encoder", PickleEncoder())
    subject.publish()
    poller = poller_for(subject.url)

    def age() -> float:
        return next(value for metric, _, value in poller.poll() if metric.name == "headroom_queue_oldest_age_seconds")

    first = age()
    time.sleep(0.2)
    assert first == 0.0
    assert 0.2 <= age() < 5.0


def test_a_namespace_comes_from_the_url(redis_server: Redis, subject: DramatiqOnRedis) -> None:
    """Keys have the prefix that the broker was given."""
    subject.client.rpush("shop:mail", "a")
    subject.client.hset("shop:mail.msgs", "a", json.dumps({"message_timestamp": int(time.time() * 1000)}))
    rows = poller_for(f"dramatiq+{redis_server.url}?queues=mail&namespace=shop").poll()
    assert {metric.name: value for metric, _, value in rows}["headroom_queue_depth"] == 1.0
