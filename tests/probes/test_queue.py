"""Jobs on a real Redis: what the poller reads, what publishers and workers measure."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis as redis_client
from celery import Celery, signals

from demo_app.stack.process import Process, free_port, wait_until
from demo_app.stack.servers import Redis
from fastapi_headroom import catalog, ledger
from fastapi_headroom.errors import MissingExtraError, SettingsError
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.queue_adapters import Poller, celery_hooks, poller_for
from fastapi_headroom.probes.queue_adapters import celery as adapter
from fastapi_headroom.settings import load
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.tracing import spans
from tests.support import celery_app
from tests.support.queue_kit import kill, total
from tests.support.serving import ROOT

WAITS = "headroom_queue_wait_seconds"
RUNS = "messaging_process_duration_seconds"
PUBLISHING = "messaging_client_operation_duration_seconds"
DEPTH, AGE, BUSY = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE, catalog.QUEUE_IN_PROGRESS

pytestmark = pytest.mark.timeout(300)  # workers start, on a machine that may be busy


@pytest.fixture
def broker(redis_server: Redis) -> Iterator[redis_client.Redis]:
    """An empty broker, and the test app publishing to it."""
    client = redis_client.Redis.from_url(redis_server.url)
    client.flushall()
    celery_app.app.conf.broker_url = redis_server.url
    yield client
    client.close()


def clock(shift: float) -> SimpleNamespace:
    """Return a stand-in for the ``time`` module whose wall clock is so many seconds off."""
    return SimpleNamespace(time=lambda: time.time() + shift, perf_counter=time.perf_counter)


def poll(poller: Poller) -> dict[tuple[str, ...], float]:
    """Return one poll's values by metric name, destination and priority."""
    return {(metric.name, *labels[1:]): value for metric, labels, value in poller.poll()}


def about(age: float, began: float) -> Any:
    """Return what equals an age that was so much at ``began`` (``time.monotonic``), half a second more or less."""
    passed = (time.monotonic() - began) / 2
    return pytest.approx(age + passed, abs=0.5 + passed)


def queue_poller(server: Redis, parameters: str = "queues=mail,reports") -> Poller:
    """Return the poller of the test app's queues."""
    return poller_for(f"celery+{server.url}?{parameters}")


def worker_process(server: Redis, folder: Path, pool: str = "prefork") -> Process:
    """Return a Celery worker with two slots for jobs, whose store is in the folder."""
    return Process(
        "celery",
        [sys.executable, "-m", "celery", "-A", "tests.support.celery_app", "worker", "--pool", pool, "-c", "2",
         "-Q", "mail,reports", "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "warning"],
        log=folder / "worker.log",
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "instrumentation")]),
            "TEST_BROKER_URL": server.url,
            "HEADROOM_DIRECTORY": str(folder / "store"),
            "C_FORCE_ROOT": "1",
        },
    )  # fmt: skip


@contextlib.contextmanager
def worker(server: Redis, folder: Path, pool: str = "prefork") -> Iterator[Path]:
    """Run a Celery worker; gives its store's directory."""
    process = worker_process(server, folder, pool)
    process.start()
    try:
        yield folder / "store"
    except TimeoutError as error:
        error.add_note(process.tail(40))
        raise
    finally:
        process.stop()


def test_depth_is_counted_by_queue_and_priority(broker: redis_client.Redis, redis_server: Redis) -> None:
    """Jobs that nobody runs are the depth of their own queue and priority step, and of no other."""
    for _ in range(3):
        celery_app.send.apply_async(priority=0)
    for _ in range(2):
        celery_app.send.apply_async(priority=7)
    celery_app.send.apply_async(queue="reports", priority=9)
    values = poll(queue_poller(redis_server))
    depths = {key[1:]: value for key, value in values.items() if key[0] == DEPTH.name}
    expected = dict.fromkeys(((queue, step) for queue in ("mail", "reports") for step in "0369"), 0.0)
    assert depths == expected | {("mail", "0"): 3.0, ("mail", "6"): 2.0, ("reports", "9"): 1.0}


def test_the_oldest_jobs_age_runs_from_its_publishing(
    broker: redis_client.Redis, redis_server: Redis, measured: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The age of a queue is that of its first job, by the time at which that was published."""
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(celery_hooks, "time", clock(-42.0))
        celery_app.send.apply_async()
    celery_app.send.apply_async()
    values = poll(queue_poller(redis_server))
    assert values[AGE.name, "mail", "0"] == about(42.0, began)
    assert values[AGE.name, "mail", "3"] == 0.0
    broker.rpop("mail")
    assert poll(queue_poller(redis_server))[AGE.name, "mail", "0"] == about(0.0, began)


def test_a_large_job_tells_its_age_too(
    broker: redis_client.Redis, redis_server: Redis, measured: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of several hundred kilobytes, whose arguments look like our header, is aged by the real header."""
    began = time.monotonic()
    monkeypatch.setattr(celery_hooks, "time", clock(-42.0))
    decoy = f'"{adapter.ENQUEUED_AT}": 1.0 '
    celery_app.app.send_task("jobs.send", args=[decoy * 20_000])
    monkeypatch.undo()
    assert broker.lrange("mail", 0, 0)[0].count(b"") > 500_000
    assert poll(queue_poller(redis_server))[AGE.name, "mail", "0"] == about(42.0, began)


@pytest.mark.parametrize(("seconds", "age"), [(-10.0, 10.0), (100.0, 0.0)])
def test_a_delayed_job_ages_from_when_it_is_due(
    broker: redis_client.Redis,
    redis_server: Redis,
    measured: Writer,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    age: float,
) -> None:
    """A job with an eta begins to age at that time and not before."""
    began = time.monotonic()
    monkeypatch.setattr(celery_hooks, "time", clock(-42.0))
    celery_app.send.apply_async(eta=datetime.now(UTC) + timedelta(seconds=seconds))
    monkeypatch.undo()
    assert poll(queue_poller(redis_server))[AGE.name, "mail", "0"] == about(age, began)


def test_a_job_without_our_header_ages_from_the_first_sight_of_it(
    broker: redis_client.Redis, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job from a publisher without the probe is aged from the first poll that finds it the oldest."""
    celery_app.send.apply_async()
    celery_app.send.apply_async()
    poller = queue_poller(redis_server)
    key = (AGE.name, "mail", "0")
    began = time.monotonic()
    assert poll(poller)[key] == 0.0
    monkeypatch.setattr(adapter, "time", clock(7.0))
    assert poll(poller)[key] == about(7.0, began)
    broker.rpop("mail")
    assert poll(poller)[key] == 0.0


def test_priorities_and_namespace_come_from_the_url(broker: redis_client.Redis, redis_server: Redis) -> None:
    """The lists asked for are those of the given priority steps and key prefix."""
    broker.lpush("shop:mail", "{}")
    broker.lpush(f"shop:mail{adapter.SEPARATOR}5", "{}", "{}")
    broker.hset("shop:unacked", "tag", "{}")
    values = poll(queue_poller(redis_server, "queues=mail&priorities=0,5&namespace=shop:"))
    assert values == {
        (DEPTH.name, "mail", "0"): 1.0,
        (DEPTH.name, "mail", "5"): 2.0,
        (AGE.name, "mail", "0"): 0.0,
        (AGE.name, "mail", "5"): 0.0,
        (BUSY.name, "_all", "_all"): 1.0,
    }


def test_a_poll_takes_the_broker_little_time(broker: redis_client.Redis, redis_server: Redis) -> None:
    """A poll of queues with 10,000 jobs uses cheap commands only, less than a millisecond of the broker's time."""
    for key in ("mail", "reports"):
        broker.lpush(key, *["x" * 500] * 10_000)
    poller = queue_poller(redis_server)
    poll(poller)
    took = []
    for _ in range(5):  # Redis tells the time that passed, also while it had to wait for the processor
        broker.config_resetstat()
        poll(poller)
        stats = broker.info("commandstats")
        used = {name.removeprefix("cmdstat_"): row["usec"] for name, row in stats.items()}
        assert {"llen", "lindex", "hlen"} <= used.keys() <= {"llen", "lindex", "hlen", "config|resetstat", "info"}
        took.append(sum(used[name] for name in ("llen", "lindex", "hlen")))
    assert min(took) < 1_000, took


def seconds_to_fail(poller: Poller) -> float:
    """Poll, which raises, and return how long that took."""
    started = time.monotonic()
    with pytest.raises(redis_client.RedisError):
        poller.poll()
    return time.monotonic() - started


def test_a_broker_that_is_down_is_an_error_at_once_and_one_that_returns_is_polled_again(tmp_path: Path) -> None:
    """A poll raises promptly while the broker is down, and succeeds again after its restart."""
    port = free_port()
    with Redis(tmp_path / "first", port=port):
        poller = poller_for(f"celery+redis://127.0.0.1:{port}/0?queues=mail")
        assert poll(poller)[DEPTH.name, "mail", "0"] == 0.0
    took = [seconds_to_fail(poller) for _ in range(4)]
    assert min(took[:2]) < 0.5 and min(took[2:]) < 0.5, took
    with Redis(tmp_path / "second", port=port) as server:
        redis_client.Redis.from_url(server.url).lpush("mail", "{}")
        assert poll(poller)[DEPTH.name, "mail", "0"] == 1.0


def test_a_broker_that_does_not_answer_is_given_up_after_a_second() -> None:
    """A poll of a peer that accepts and stays silent raises after its time-out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        poller = poller_for(f"celery+redis://127.0.0.1:{silent.getsockname()[1]}/0?queues=mail")
        took = [seconds_to_fail(poller) for _ in range(2)]
        assert 0.5 < min(took) < 2.0, took


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("sqs://user:secret@host/0?queues=mail", "celery+redis"),
        ("celery+redis://user:secret/@host/0?queues=mail", "it looks like celery+redis://host:6379"),
        ("celery+redis://user:secret@host/0", "queues=mail,reports"),
        ("celery+redis://user:secret@host/0?queues=mail&queue=x", "known are queues"),
        ("celery+redis://user:secret@host/0?queues=mail&priorities=high", "numbers, such as 0,3,6,9"),
    ],
)
def test_a_queue_url_that_cannot_be_used_names_the_remedy(url: str, remedy: str) -> None:
    """A wrong queue URL is one clear error that shows how it should look and holds no credentials."""
    with pytest.raises(SettingsError, match=remedy.replace("+", r"\+")) as caught:
        poller_for(url)
    assert "secret" not in str(caught.value)


def test_polling_without_the_redis_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redis-py the error says what to install."""
    monkeypatch.setitem(sys.modules, "redis.connection", None)
    with pytest.raises(MissingExtraError, match=r"fastapi-headroom\[redis\]"):
        poller_for("celery+redis://host/0?queues=mail")


def test_publishing_is_timed_and_charged_to_the_request(broker: redis_client.Redis, measured: Writer) -> None:
    """Handing a job over is counted by queue and opens and closes the publish stage of the request's ledger."""
    calls: list[tuple[str, int]] = []

    class Recorder(ledger.Ledger):
        def enter(self, stage: int) -> None:
            calls.append(("enter", stage))

        def leave(self, stage: int) -> None:
            calls.append(("leave", stage))

    token = ledger.current.set(Recorder())
    try:
        celery_app.send.apply_async(queue="reports")
    finally:
        ledger.current.reset(token)
    labels = {
        "messaging_system": "redis",
        "messaging_operation_name": "publish",
        "messaging_destination_name": "reports",
    }
    assert measured.value(f"{PUBLISHING}_count", **labels) == 1.0
    assert 0.0 < measured.value(f"{PUBLISHING}_sum", **labels) < 1.0
    assert calls == [("enter", ledger.PUBLISH), ("leave", ledger.PUBLISH)]


def test_a_failed_publish_raises_what_it_raised_before(broker: redis_client.Redis, measured: Writer) -> None:
    """When the broker takes no more the app sees the same error as before, and the time it took is counted."""
    broker.config_set("maxmemory", "1")
    try:
        with pytest.raises(Exception, match="maxmemory"):
            celery_app.send.apply_async(retry=False)
    finally:
        broker.config_set("maxmemory", "0")
    labels = {"messaging_system": "redis", "messaging_operation_name": "publish", "messaging_destination_name": "mail"}
    assert measured.value(f"{PUBLISHING}_count", **labels) == 1.0


def test_the_trace_context_goes_with_the_job(broker: redis_client.Redis, measured: Writer) -> None:
    """While traces are on, a job carries the W3C trace context of the request that published it."""
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    spans.activate(provider)
    try:
        with provider.get_tracer("test").start_as_current_span("request") as span:
            celery_app.send.apply_async()
    finally:
        spans.deactivate()
    headers: dict[str, Any] = json.loads(broker.rpop("mail") or b"")["headers"]
    assert headers["traceparent"].split("-")[1] == format(span.get_span_context().trace_id, "032x")
    celery_app.send.apply_async()
    assert "traceparent" not in json.loads(broker.rpop("mail") or b"")["headers"]


def test_celery_imported_after_the_start_is_seen_and_close_puts_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe attaches once Celery is there, attaches once only, and leaves nothing behind."""
    before = Celery.send_task, len(signals.before_task_publish.receivers), len(signals.task_prerun.receivers)
    probe = QueueProbe(load({}))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "celery.app.base")
        probe.bind(Writer.in_memory())
        probe.sample()
        assert Celery.send_task is before[0]
    probe.sample()
    wrapped = Celery.send_task
    assert wrapped is not before[0]
    probe.bind(Writer.in_memory())
    assert Celery.send_task is wrapped
    assert len(signals.task_prerun.receivers) == before[2] + 1
    probe.close()
    probe.close()
    assert before == (Celery.send_task, len(signals.before_task_publish.receivers), len(signals.task_prerun.receivers))


def test_a_worker_measures_waits_runs_failures_and_retries(
    broker: redis_client.Redis, redis_server: Redis, measured: Writer, tmp_path: Path
) -> None:
    """A prefork worker empties the queue, and its children's stores show waits, run times, errors and retries."""
    poller = queue_poller(redis_server)
    published = time.time()
    for _ in range(4):
        celery_app.send.apply_async()
    celery_app.fail.apply_async(queue="reports")
    celery_app.again.apply_async()
    assert poll(poller)[DEPTH.name, "mail", "0"] == 5.0
    with worker(redis_server, tmp_path) as directory:
        wait_until(lambda: total(directory, f"{RUNS}_count") == 8.0, 60, "eight runs: 4 + 1 + 3")
        took = time.time() - published
        values = poll(poller)
        assert {value for key, value in values.items() if key[0] in (DEPTH.name, AGE.name)} == {0.0}

        def runs(task: str, error: str) -> float:
            return total(directory, f"{RUNS}_count", headroom_task=task, error_type=error)

        assert runs("jobs.send", "") == 4.0
        assert runs("jobs.fail", "ValueError") == 1.0
        assert (runs("jobs.again", "ConnectionError"), runs("jobs.again", "")) == (2.0, 1.0)
        retries = "headroom_queue_retries_total"
        assert total(directory, retries, headroom_task="jobs.again") == 2.0
        assert total(directory, retries) == 2.0
        mail = {"messaging_system": "redis", "messaging_destination_name": "mail"}
        assert total(directory, f"{WAITS}_count", **mail) == 7.0
        # the five jobs that were there before the worker waited for it to start, and none for longer than all took
        assert 0.3 * 5 < total(directory, f"{WAITS}_sum", **mail) <= 7 * took

        celery_app.hold.apply_async()
        wait_until(lambda: poll(poller)[BUSY.name, "_all", "_all"] == 1.0, 60, "a job in progress")
        broker.lpush(celery_app.GATE, "open")
        wait_until(lambda: poll(poller)[BUSY.name, "_all", "_all"] == 0.0, 60, "no job in progress")
        assert Reader(directory).read().alive == [0, 1, 2], "the main process and its two children, one slot each"


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_worker_without_children_measures_itself(
    broker: redis_client.Redis, redis_server: Redis, tmp_path: Path, pool: str
) -> None:
    """The pools that run jobs in the worker's own process claim one slot for it."""
    celery_app.send.apply_async()
    with worker(redis_server, tmp_path, pool) as directory:
        wait_until(lambda: total(directory, f"{RUNS}_count", headroom_task="jobs.send") == 1.0, 60, "one run")
        assert Reader(directory).read().alive == [0]


def test_a_run_that_is_cut_short_has_an_error_type_that_says_how(
    broker: redis_client.Redis, redis_server: Redis, tmp_path: Path
) -> None:
    """A soft time limit, a hard one, a killed child and one that left are one run each, with an error type that tells,
    though all but the first end the process that would have counted them."""
    celery_app.last.apply_async((20,), soft_time_limit=0.3)
    celery_app.last.apply_async((20,), time_limit=0.4)
    celery_app.die.apply_async()
    celery_app.leave.apply_async()
    with worker(redis_server, tmp_path) as directory:
        wait_until(lambda: total(directory, f"{RUNS}_count") == 4.0, 60, "four runs")
        celery_app.send.apply_async()
        wait_until(lambda: total(directory, f"{RUNS}_count", error_type="") == 1.0, 60, "a run by a new child")

        def run(sample: str, task: str, error: str) -> float:
            names = {"messaging_system": "redis", "messaging_destination_name": "mail"}
            return total(directory, f"{RUNS}_{sample}", **names, headroom_task=task, error_type=error)

        assert run("count", "jobs.last", "SoftTimeLimitExceeded") == 1.0
        assert run("count", "jobs.last", "TimeLimitExceeded") == 1.0
        assert 0.3 < run("sum", "jobs.last", "TimeLimitExceeded") < 5.0
        assert run("count", "jobs.die", "WorkerLostError") == 1.0
        assert run("count", "jobs.leave", "WorkerLostError") == 1.0
        assert total(directory, f"{RUNS}_count") == 5.0


def test_a_worker_says_which_queues_it_takes_jobs_from(
    broker: redis_client.Redis, redis_server: Redis, tmp_path: Path
) -> None:
    """Each queue of a living worker has a consumer, one that it was told to leave has none, and when the worker was
    killed nobody says anything."""
    process = worker_process(redis_server, tmp_path)

    def consumers(queue: str) -> float | None:
        name, labels = catalog.QUEUE_CONSUMERS.name, {"messaging_system": "redis", "priority": "_all"}
        wanted = {**labels, "messaging_destination_name": queue}
        families = Reader(tmp_path / "store").read().families if (tmp_path / "store").is_dir() else []
        found = [value for it in families for row, pairs, value in it.samples if row == name and dict(pairs) == wanted]
        return found[0] if found else None

    process.start()
    try:
        wait_until(lambda: (consumers("mail"), consumers("reports")) == (1.0, 1.0), 60, "both queues")
        # What is said before the worker listens is said to nobody.
        wait_until(lambda: bool(celery_app.app.control.ping(timeout=0.5)), 60, "the worker to take orders")
        celery_app.app.control.cancel_consumer("reports")
        wait_until(lambda: (consumers("mail"), consumers("reports")) == (1.0, 0.0), 60, "the order to leave one")
        kill(process)
        wait_until(lambda: (consumers("mail"), consumers("reports")) == (None, None), 60, "all to be dead")
    except TimeoutError as error:
        error.add_note(process.tail(40))
        raise
    finally:
        process.stop()


def test_names_beyond_the_limit_are_folded() -> None:
    """The first names keep their own value for good, all later ones share one."""
    names = BoundedNames(limit=2)
    assert [names(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]
