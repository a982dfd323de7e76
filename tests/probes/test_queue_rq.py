"""RQ on a real Redis: what publishers and workers measure."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
import rq
from rq.job import Job

from demo_app.stack.process import Process, wait_until
from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.probes.queue_adapters.rq_hooks import KILLED
from fastapi_headroom.settings import load
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.support import queue_jobs
from tests.support.queue_kit import PYTHON, Subject, total
from tests.support.queue_series import PUBLISHING, RETRIES, RUNS, WAITS
from tests.support.queue_subjects import RQ
from tests.support.serving import ROOT


@pytest.fixture
def subject(redis_server: Redis, tmp_path: Path) -> RQ:
    """An empty queue."""
    made = RQ(redis_server, tmp_path)
    made.start()
    return made


@contextlib.contextmanager
def worker(subject: Subject, kind: str) -> Iterator[Path]:
    """Run a measured worker; gives its store's directory."""
    directory = subject.folder / "store"
    process = Process(
        "rq", [PYTHON, "-m", "tests.support.rq_app", kind, subject.server.url, "mail"],  # type: ignore[attr-defined]
        log=subject.folder / "worker.log", cwd=ROOT,
        env=subject.environment(),
    )  # fmt: skip
    process.start()
    try:
        yield directory
    except (AssertionError, TimeoutError) as error:
        error.add_note(process.tail(40))
        raise
    finally:
        process.stop()


@pytest.mark.parametrize("kind", ["forking", "simple"])
def test_a_worker_measures_waits_runs_failures_and_retries(subject: RQ, kind: str) -> None:
    """Waits, run times, errors and retries are in the worker's own slot, one slot for all of its work-horses."""
    published = time.time()
    subject.publish(4)
    subject.publish(kind="fail")
    subject.publish(kind="again")
    time.sleep(0.3)
    with worker(subject, kind) as directory:
        wait_until(lambda: total(directory, f"{RUNS}_count") == 8.0, 60, "eight runs: 4 + 1 + 3")
        took = time.time() - published

        def runs(error: str) -> float:
            return total(
                directory, f"{RUNS}_count", messaging_system="redis", messaging_destination_name="mail",
                headroom_task="tests.support.queue_jobs.run", error_type=error,
            )  # fmt: skip

        assert (runs(""), runs("ValueError"), runs("ConnectionError")) == (5.0, 1.0, 2.0)
        assert total(directory, RETRIES, headroom_task="tests.support.queue_jobs.run") == 2.0
        mail = {"messaging_system": "redis", "messaging_destination_name": "mail"}
        assert total(directory, f"{WAITS}_count", **mail) == 8.0
        # the six jobs that were there before the worker waited for it to start, and none for longer than all took
        assert 0.3 * 6 < total(directory, f"{WAITS}_sum", **mail) <= 8 * took
        assert Reader(directory).read().alive == [0]
        assert total(directory, "headroom_worker_restarts_total") == 0.0
    assert subject.truth() == 0


def test_a_job_that_kills_its_work_horse_is_a_failed_run(subject: RQ) -> None:
    """A job whose process dies is counted with an error type that says so, and the next one is measured as ever."""
    subject.publish(kind="die")
    subject.publish()
    with worker(subject, "forking") as directory:
        wait_until(lambda: total(directory, f"{RUNS}_count") == 2.0, 60, "two runs")
        assert total(directory, f"{RUNS}_count", error_type=KILLED) == 1.0
        assert total(directory, f"{RUNS}_count", error_type="") == 1.0
        assert total(directory, f"{WAITS}_count") == 2.0
    rows = {metric.name: value for metric, _, value in poller_for(subject.url).poll()}
    assert rows["headroom_queue_failed"] == 1.0


def test_a_job_that_takes_longer_than_it_may_is_a_time_out(subject: RQ) -> None:
    """A job over its time limit is one run with RQ's error type for that, about as long as the limit."""
    subject.queue.enqueue(queue_jobs.run, str(subject.folder), "hold", job_timeout=1)
    with worker(subject, "forking") as directory:
        wait_until(lambda: total(directory, f"{RUNS}_count", error_type="JobTimeoutException") == 1.0, 60, "the end")
        assert 0.9 < total(directory, f"{RUNS}_sum", error_type="JobTimeoutException") < 5.0
        assert total(directory, f"{RUNS}_count") == 1.0


def test_publishing_is_timed_once_and_charged_to_the_request(subject: RQ, measured: Writer) -> None:
    """Each way to hand a job over is counted once and is the publish stage of the request's ledger."""
    calls: list[tuple[str, int]] = []

    class Recorder(ledger.Ledger):
        def enter(self, stage: int) -> None:
            calls.append(("enter", stage))

        def leave(self, stage: int) -> None:
            calls.append(("leave", stage))

    token = ledger.current.set(Recorder())
    try:
        subject.queue.enqueue(queue_jobs.run, "x")
        subject.queue.enqueue_in(timedelta(hours=1), queue_jobs.run, "x")
        subject.queue.enqueue_many([rq.Queue.prepare_data(queue_jobs.run, ("x",))] * 2)
        subject.queue.enqueue_job(Job.create(queue_jobs.run, ("x",), connection=subject.client))
    finally:
        ledger.current.reset(token)
    labels = {"messaging_system": "redis", "messaging_operation_name": "publish", "messaging_destination_name": "mail"}
    assert measured.value(f"{PUBLISHING}_count", **labels) == 4.0
    assert 0.0 < measured.value(f"{PUBLISHING}_sum", **labels) < 4.0
    assert calls == [("enter", ledger.PUBLISH), ("leave", ledger.PUBLISH)] * 4


def test_what_is_run_in_place_or_put_into_a_pipeline_is_not_published(subject: RQ, measured: Writer) -> None:
    """A queue without workers runs its jobs at once, and a pipeline is sent by its owner: neither is timed."""
    here = rq.Queue("mail", connection=subject.client, is_async=False)
    assert here.enqueue(queue_jobs.run, str(subject.folder)).is_finished
    with subject.client.pipeline() as pipeline:
        subject.queue.enqueue(queue_jobs.run, "x", pipeline=pipeline)
    assert not any(name.startswith((PUBLISHING, RUNS, WAITS)) for name, _ in measured.samples())


def test_a_failed_publish_raises_what_it_raised_before(measured: Writer) -> None:
    """Without a broker the app sees the same error as before, and the time it took is counted."""
    queue = rq.Queue("mail", connection=redis_client.Redis(port=1))
    with pytest.raises(redis_client.ConnectionError):
        queue.enqueue(queue_jobs.run, "x")
    labels = {"messaging_system": "redis", "messaging_operation_name": "publish", "messaging_destination_name": "mail"}
    assert measured.value(f"{PUBLISHING}_count", **labels) == 1.0


def test_close_puts_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe attaches once RQ is imported, attaches once only, and leaves nothing behind."""

    def patched() -> tuple[Any, ...]:
        return (rq.Queue.enqueue_call, rq.Queue.schedule_job, rq.Worker.execute_job, rq.SimpleWorker.execute_job,
                Job.perform, Job.retry, Job.to_dict, Job.restore, rq.Worker.handle_job_retry)  # fmt: skip

    before = patched()
    probe = QueueProbe(load({}))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "rq")
        probe.bind(Writer.in_memory())
        assert patched() == before
    probe.sample()
    wrapped = patched()
    assert not set(before) & set(wrapped)
    probe.bind(Writer.in_memory())
    assert patched() == wrapped
    probe.close()
    probe.close()
    assert patched() == before


def test_queues_are_found_or_named(subject: RQ) -> None:
    """All queues that RQ knows are polled without being named, and only those that are named otherwise."""
    subject.publish()
    rq.Queue("reports", connection=subject.client).enqueue(queue_jobs.run, "x")
    found = {labels[1] for _, labels, _ in poller_for(f"rq+{subject.server.url}").poll()}  # type: ignore[attr-defined]
    assert found == {"mail", "reports"}
    assert {labels[1] for _, labels, _ in poller_for(subject.url).poll()} == {"mail"}
