"""From a request to its jobs: one trace, through real brokers and workers, as a collector receives it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_client

from demo_app.stack.process import Process, wait_until
from demo_app.stack.servers import Redis
from tests.support.serving import ROOT, Serving, serve
from tests.tracing.receiver import Receiver, Span

APP = "tests.tracing.jobs_app:app"
CELERY = ["-m", "celery", "-A", "tests.tracing.jobs_worker", "worker", "-c", "1", "--without-gossip",
          "--without-mingle", "--without-heartbeat", "-l", "warning"]  # fmt: skip
WORKERS = {
    "prefork": [*CELERY, "--pool", "prefork"],
    "forking": ["-m", "tests.tracing.jobs_worker", "forking"],
    "simple": ["-m", "tests.tracing.jobs_worker", "simple"],
}

pytestmark = pytest.mark.timeout(300)  # workers start, on a machine that may be busy


@pytest.fixture
def broker(redis_server: Redis) -> Iterator[str]:
    """An empty broker's URL."""
    with redis_client.Redis.from_url(redis_server.url) as client:
        client.flushall()
    yield redis_server.url


@contextlib.contextmanager
def running(kind: str, receiver: Receiver | None, broker: str, folder: Path, **extra: str) -> Iterator[Serving]:
    """Run the app and one worker, both exporting to a receiver if there is one."""
    env = {"TEST_BROKER_URL": broker, "OTEL_BSP_SCHEDULE_DELAY": "100", "C_FORCE_ROOT": "1", **extra}
    if receiver is not None:
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.url
    path = os.pathsep.join([str(ROOT), str(ROOT / "instrumentation")])
    store = {"PYTHONPATH": path, "HEADROOM_DIRECTORY": str(folder / "store")}
    worker = Process(
        "worker", [sys.executable, *WORKERS[kind]],
        log=folder / "worker.log", cwd=ROOT, env={**os.environ, **env, **store}, grace=3.0,
    )  # fmt: skip
    with serve("uvicorn", APP, env=env) as server, worker:
        try:
            yield server
        except (AssertionError, TimeoutError) as error:
            error.add_note(worker.tail(30) + server.log())
            raise


def trace_of(receiver: Receiver, kind: str, count: int = 1, jobs: int = 1) -> list[list[Span]]:
    """Wait for the traces that hold so many ended runs each; return them."""

    def complete() -> list[list[Span]]:
        trees = [tree for tree in receiver.trees() if any(span.kind == "SERVER" for span in tree)]
        return [tree for tree in trees if sum(span.kind == kind for span in tree) >= jobs]

    wait_until(lambda: len(complete()) >= count, 60, f"{count} traces from request to job")
    return complete()


@pytest.mark.parametrize("kind", WORKERS)
def test_a_request_and_its_job_are_one_trace(kind: str, broker: str, tmp_path: Path) -> None:
    """The run of a job is one consumer span below the request that handed it over, failed where the job failed; what
    it asks of a database is below that, and may be lost where the job has a process of its own."""
    way = "celery" if kind == "prefork" else "rq"
    with Receiver() as receiver, running(kind, receiver, broker, tmp_path) as server:
        jobs = {json.loads(server.get(f"/{way}/look?number={number}")): number for number in (7, -7)}
        trees = trace_of(receiver, "CONSUMER", 2)
        if kind != "forking":
            wait_until(lambda: sum(span.kind == "CLIENT" for span in receiver.spans) == 2, 60, "the queries' spans")
            trees = trace_of(receiver, "CONSUMER", 2)
    assert len(trees) == 2
    for tree in trees:
        (request,) = [span for span in tree if span.kind == "SERVER"]
        (run,) = [span for span in tree if span.kind == "CONSUMER"]
        queue = "mail" if way == "celery" else "mail-rq"
        assert (run.parent, run.name) == (request.id, f"process {queue}")
        failed = jobs[run.attributes["messaging.message.id"]] < 0
        assert run.attributes == {
            "messaging.system": "redis",
            "messaging.destination.name": queue,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.message.id": run.attributes["messaging.message.id"],
            "headroom.task": "orders.look" if way == "celery" else "tests.tracing.job_tasks.look",
        } | ({"error.type": "ValueError"} if failed else {})
        assert run.start > request.start
        queries = [span for span in tree if span.kind == "CLIENT"]
        assert [span.parent for span in queries] in ([[run.id], []] if kind == "forking" else [[run.id]])
    assert sum(span.kind == "CONSUMER" for span in receiver.spans) == 2


def test_each_attempt_has_a_span_whatever_became_of_it(broker: str, tmp_path: Path) -> None:
    """A job that is tried again has a span for each attempt, all in the one trace of the request, and one that was
    killed has its span from the worker's main process."""
    with Receiver() as receiver, running("prefork", receiver, broker, tmp_path) as server:
        server.get("/celery/again?number=7")
        (tree,) = trace_of(receiver, "CONSUMER", jobs=2)
        server.get("/celery/die?number=7")
        wait_until(lambda: sum(span.kind == "CONSUMER" for span in receiver.spans) == 3, 60, "the killed run's span")
        (killed,) = (t for t in trace_of(receiver, "CONSUMER", 2) if any("die" in str(s.attributes) for s in t))
    request, run = killed
    assert (run.parent, run.attributes["error.type"]) == (request.id, "WorkerLostError")
    first, second = (span for span in tree if span.kind == "CONSUMER")
    assert first.attributes["error.type"] == "ConnectionError"
    assert "error.type" not in second.attributes
    assert second.parent == first.id


def test_celery_that_the_user_instrumented_has_one_consumer_span_per_job(broker: str, tmp_path: Path) -> None:
    """With OpenTelemetry's own instrumentation of Celery on in app and worker, its spans are the only ones of a job."""
    with Receiver() as receiver, running("prefork", receiver, broker, tmp_path, TEST_INSTRUMENTED="1") as server:
        for number in (7, 8):
            server.get(f"/celery/look?number={number}")
        trees = trace_of(receiver, "CONSUMER", 2)
        wait_until(lambda: sum(span.kind == "CLIENT" for span in receiver.spans) == 2, 60, "the queries' spans")
        trees = trace_of(receiver, "CONSUMER", 2)
    for tree in trees:
        (producer,) = [span for span in tree if span.kind == "PRODUCER"]
        (run,) = [span for span in tree if span.kind == "CONSUMER"]
        (query,) = [span for span in tree if span.kind == "CLIENT"]
        assert (run.name, run.parent, query.parent) == ("run/orders.look", producer.id, run.id)
    assert sum(span.kind == "CONSUMER" for span in receiver.spans) == 2


def test_an_unsampled_request_has_no_span_of_its_job(broker: str, tmp_path: Path) -> None:
    """A job of a request that was sampled away is not traced either; one of a sampled request in the same app is."""
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}
    with Receiver() as receiver, running("prefork", receiver, broker, tmp_path, **sampler) as server:

        def traces(kind: str) -> list[str]:
            return sorted(span.trace for span in receiver.spans if span.kind == kind)

        for _ in range(30):
            server.get("/celery/look?number=7")
        client = redis_client.Redis.from_url(broker)
        wait_until(lambda: not client.llen("mail") and not client.hlen("unacked"), 60, "all jobs done")
        wait_until(lambda: traces("CONSUMER") == traces("SERVER"), 60, "a run for each request that was sampled")
        assert 0 < len(traces("SERVER")) < 30


def test_without_tracing_jobs_carry_nothing(broker: str) -> None:
    """When nothing asks for traces, a job in the broker is as its library made it, without a trace context."""
    with serve("uvicorn", APP, env={"TEST_BROKER_URL": broker}) as server:
        task, job = (json.loads(server.get(f"/{way}/look?number=7")) for way in ("celery", "rq"))
    client = redis_client.Redis.from_url(broker)
    headers = json.loads(client.lindex("mail", 0) or b"")["headers"]
    assert headers["id"] == task
    assert not [name for name in headers if "trace" in name and name != "traceback"]
    assert not [field for field in client.hkeys(f"rq:job:{job}") if b"trace" in field]
