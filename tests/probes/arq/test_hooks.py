"""arq on a real Redis: what publishers and workers measure."""

from __future__ import annotations

import asyncio
import pickle
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import arq.connections
import arq.worker
import pytest
import redis as redis_client
from arq import ArqRedis, Worker, cron, func
from arq.connections import RedisSettings, create_pool
from arq.jobs import Job

from demo_app.stack.process import wait_until
from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.probes.queue_adapters.arq_hooks import FIELD
from fastapi_headroom.probes.redis_hooks import address_of
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.tracing import spans
from tests.support import cache_counts
from tests.support.arq_subject import Arq
from tests.support.queue_kit import total
from tests.support.queue_series import MAIL, PUBLISHED, PUBLISHING, RETRIES, RUNS, WAITS
from tests.support.traced import traced


@pytest.fixture
def subject(redis_server: Redis, tmp_path: Path) -> Arq:
    """An empty queue."""
    made = Arq(redis_server, tmp_path)
    made.start()
    return made


async def ran(writer: Writer) -> None:
    """Wait until a run has ended: a worker that is closed before, while it writes a result, raises CancelledError."""
    async with asyncio.timeout(30):
        while not any(name == f"{RUNS}_count" and value for (name, _), value in writer.samples().items()):
            await asyncio.sleep(0.01)


def test_a_worker_measures_waits_runs_failures_retries_and_time_outs(subject: Arq) -> None:
    """Each outcome of a run has its error type; what comes again is a retry; what arq gives up is a failed run."""

    async def enqueue(client: ArqRedis) -> None:
        for kind in ("count", "count", "again", "fail"):
            await client.enqueue_job("kit", str(subject.folder), kind)
        await client.enqueue_job("sleep", 30.0)
        await client.enqueue_job("nobody")

    subject.with_client(enqueue)
    store = subject.folder / "store"

    def runs(task: str, error: str) -> float:
        return total(store, f"{RUNS}_count", **MAIL, headroom_task=task, error_type=error)

    with subject.worker():
        wait_until(lambda: total(store, f"{RUNS}_count") == 8.0, 60, "eight runs: 2 + 3 + 1 + 1 + 1")
        assert (runs("kit", ""), runs("kit", "Retry"), runs("kit", "ValueError")) == (3.0, 2.0, 1.0)
        assert (runs("sleep", "TimeoutError"), runs("nobody", "JobExecutionFailed")) == (1.0, 1.0)
        assert 0.2 <= total(store, f"{RUNS}_sum", headroom_task="sleep") < 2.0
        assert total(store, RETRIES, **MAIL, headroom_task="kit") == 2.0
        assert total(store, RETRIES, **MAIL) == 2.0
        assert total(store, f"{WAITS}_count", **MAIL) == 8.0


def test_a_wait_runs_from_when_a_job_is_due(subject: Arq) -> None:
    """Neither a schedule, nor the time of a retry that is due later, nor an earlier try counts as waiting."""

    async def enqueue(client: ArqRedis) -> None:
        await client.enqueue_job("later", 2.0)
        await client.enqueue_job("kit", str(subject.folder), _defer_by=timedelta(seconds=2.0))
        await client.enqueue_job("sleep", 0.15)

    store = subject.folder / "store"
    with subject.worker():
        wait_until(lambda: (subject.folder / "store").exists(), 60, "the worker")
        subject.with_client(enqueue)
        wait_until(lambda: total(store, f"{WAITS}_count", **MAIL) == 4.0, 60, "four runs")
        assert total(store, f"{WAITS}_sum", **MAIL) < 2.0


async def test_what_is_aborted_or_given_back_is_told_apart(subject: Arq, measured: Writer) -> None:
    """A job that is aborted is no retry; one that a worker gives back at its end is, and waits from then on anew."""

    async def forever(context: dict[str, Any]) -> None:
        await asyncio.sleep(60)

    settings = RedisSettings.from_dsn(subject.server.url)  # type: ignore[attr-defined]
    client = await create_pool(settings, default_queue_name="mail")

    def worker() -> Worker:
        return Worker(
            [func(forever, name="forever")], queue_name="mail", redis_settings=settings, poll_delay=0.02,
            handle_signals=False, allow_abort_jobs=True,
        )  # fmt: skip

    async def started(one: Worker) -> None:
        while not one.job_tasks:
            await asyncio.sleep(0.01)

    first = worker()
    running = asyncio.create_task(first.async_run())
    waited, began = 0.0, time.monotonic()
    job = await client.enqueue_job("forever")
    assert isinstance(job, Job)
    await started(first)
    waited += time.monotonic() - began
    assert await job.abort()
    labels = {**MAIL, "headroom_task": "forever"}
    assert measured.value(f"{RUNS}_count", **labels, error_type="CancelledError") == 1.0
    assert measured.value(RETRIES, **labels) == 0.0

    began = time.monotonic()
    await client.enqueue_job("forever")
    await started(first)
    waited += time.monotonic() - began
    began = time.monotonic()
    running.cancel()
    await first.close()
    assert measured.value(f"{RUNS}_count", **labels, error_type="CancelledError") == 2.0
    assert measured.value(RETRIES, **labels) == 1.0

    await asyncio.sleep(0.5)  # long after its enqueueing, not long after it was given back
    second = worker()
    running = asyncio.create_task(second.async_run())
    await started(second)
    waited += time.monotonic() - began
    running.cancel()
    await second.close()
    assert measured.value(f"{WAITS}_count", **MAIL) == 3.0
    assert 0.5 <= measured.value(f"{WAITS}_sum", **MAIL) <= waited + 0.01
    await client.aclose()


async def test_cron_jobs_are_jobs(subject: Arq, measured: Writer) -> None:
    """A cron job that its worker enqueues is measured like any other."""

    async def nightly(context: dict[str, Any]) -> None: ...

    worker = Worker(cron_jobs=[cron(nightly, name="nightly", run_at_startup=True)], queue_name="mail", poll_delay=0.02,
                    redis_settings=RedisSettings.from_dsn(subject.server.url), handle_signals=False)  # type: ignore[attr-defined] # fmt: skip
    running = asyncio.create_task(worker.async_run())
    await ran(measured)
    running.cancel()
    await worker.close()
    assert measured.value(f"{RUNS}_count", **MAIL, headroom_task="nightly", error_type="") == 1.0
    assert measured.value(f"{PUBLISHING}_count", **PUBLISHED) == 1.0


def test_publishing_is_timed_and_charged_to_the_request(subject: Arq, measured: Writer) -> None:
    """Handing a job over is counted by queue and is the publish stage of the request's ledger, and no other."""
    request = ledger.Ledger("POST")
    token = ledger.current.set(request)
    try:
        subject.publish()
    finally:
        ledger.current.reset(token)
    assert measured.value(f"{PUBLISHING}_count", **PUBLISHED) == 1.0
    spent = measured.value(f"{PUBLISHING}_sum", **PUBLISHED)
    assert 0.0 < spent < 5.0
    assert request.seconds[ledger.PUBLISH] == pytest.approx(spent, rel=0.3, abs=0.002)
    assert request.seconds[ledger.CACHE] == 0.0


async def test_a_failed_publish_raises_what_it_raised_before(measured: Writer) -> None:
    """Without a broker the app sees the same error as before, and the time it took is counted."""
    client = ArqRedis(host="127.0.0.1", port=1, default_queue_name="mail")
    with pytest.raises(redis_client.ConnectionError):
        await client.enqueue_job("kit")
    await client.aclose()
    assert measured.value(f"{PUBLISHING}_count", **PUBLISHED) == 1.0


def test_the_trace_context_goes_with_the_job(subject: Arq, measured: Writer) -> None:
    """While traces are on a job carries the W3C context of who published it, in a field that arq does not look at."""
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()

    def published() -> dict[str, Any]:
        subject.start()
        subject.publish()
        (key,) = subject.client.keys("arq:job:*")
        fields = pickle.loads(subject.client.get(key))
        return dict(fields)

    spans.activate(provider)
    try:
        with provider.get_tracer("test").start_as_current_span("request") as span:
            fields = published()
        assert fields[FIELD]["traceparent"].split("-")[1] == format(span.get_span_context().trace_id, "032x")
        assert FIELD not in published(), "outside of a span there is nothing to carry"
    finally:
        spans.deactivate()
    assert fields["f"] == "kit"
    assert subject.with_client(lambda client: client.queued_jobs())[0].function == "kit"


async def test_a_request_and_the_runs_of_its_job_are_one_trace(subject: Arq, measured: Writer) -> None:
    """Each run of a job is a consumer span below the request that enqueued it, and what the job does is below that."""
    settings = RedisSettings.from_dsn(subject.server.url)  # type: ignore[attr-defined]
    client = await create_pool(settings, default_queue_name="mail")
    with traced() as traces:

        async def look(context: dict[str, Any]) -> None:
            with traces.tracer.start_as_current_span("query"):
                await asyncio.sleep(0)

        with traces.tracer.start_as_current_span("request"):
            await client.enqueue_job("look")
        worker = Worker([func(look, name="look")], queue_name="mail", redis_settings=settings, poll_delay=0.02,
                        handle_signals=False, burst=True)  # fmt: skip
        await worker.async_run()
        await worker.close()
        await client.aclose()
        traces.assert_runs("request", attempts=1)
        (query,), (run,) = traces.named("query"), traces.named("process mail")
    assert query.parent == run.context
    assert run.attributes is not None
    assert run.attributes["headroom.task"] == "look"


async def test_a_queue_that_is_polled_is_no_look_up_of_a_cache(subject: Arq, measured: Writer) -> None:
    """A worker's polls of a queue of any name, and asking a job for its state, judge nothing; what else goes over the
    same pool, such as a job's own cache, counts as before."""
    writer, probe = Writer.in_memory(), CacheProbe(load({}))
    probe.bind(writer)
    settings = RedisSettings.from_dsn(subject.server.url)  # type: ignore[attr-defined]
    client = await create_pool(settings, default_queue_name="mail")
    cache = address_of(client)

    async def look(context: dict[str, Any]) -> None:
        await context["redis"].get("plan:1")

    worker = Worker([func(look, name="look")], queue_name="mail", redis_pool=client, poll_delay=0.01,
                    handle_signals=False)  # fmt: skip
    running = asyncio.create_task(worker.async_run())
    try:
        async with asyncio.timeout(30):
            while cache_counts.operations(writer, cache).get("zrangebyscore", 0.0) < 5.0:
                await asyncio.sleep(0.01)
            job = await client.enqueue_job("look")
            assert isinstance(job, Job)
            await job.result(poll_delay=0.01)
            await job.status()
            await client.get("mail:1")
        await ran(measured)
        assert cache_counts.results(writer, cache) == {("plan:{}", "miss"): 1.0, ("mail:{}", "miss"): 1.0}
        assert writer.value("headroom_probe_up", probe="cache") == 1.0
    finally:
        running.cancel()
        await worker.close()
        probe.close()


def test_close_puts_all_back() -> None:
    """The probe attaches once and leaves nothing behind, not in a worker that ran either."""

    def patched() -> tuple[Any, ...]:
        return (ArqRedis.enqueue_job, arq.connections.serialize_job, arq.worker.deserialize_job_raw, Worker.run_job,
                Worker.finish_job, Worker._poll_iteration, Job.__init__)  # fmt: skip

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


def test_the_default_queue_needs_no_name(redis_server: Redis, subject: Arq) -> None:
    """Without ``queues=`` arq's own default queue is polled."""
    now = int(time.time() * 1000)
    subject.client.zadd("arq:queue", {"a": now - 2_000, "b": now - 1_000, "c": now + 60_000})
    subject.client.set("arq:in-progress:a", "1")
    rows = {metric.name: (labels, value) for metric, labels, value in poller_for(f"arq+{redis_server.url}").poll()}
    assert rows["headroom_queue_depth"] == (("redis", "arq:queue", "_all"), 1.0)
    assert rows["headroom_queue_in_progress"][1] == 1.0
    assert rows["headroom_queue_delayed"][1] == 1.0
    assert rows["headroom_queue_oldest_age_seconds"][1] == pytest.approx(1.0, abs=0.5)
