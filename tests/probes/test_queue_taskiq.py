"""TaskIQ on a real Redis: what publishers and workers measure, and what a message tells of its age."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from taskiq import AsyncBroker, InMemoryBroker, TaskiqResult
from taskiq.api import run_receiver_task
from taskiq.context import Context
from taskiq.exceptions import SendTaskError
from taskiq.kicker import AsyncKicker
from taskiq.message import TaskiqMessage
from taskiq.receiver import Receiver
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend
from taskiq_redis.exceptions import ResultIsMissingError

import fastapi_headroom as headroom
from demo_app.stack.servers import Redis as RedisServer
from fastapi_headroom import ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.probes.queue_adapters.taskiq import ready_since
from fastapi_headroom.probes.queue_adapters.taskiq_hooks import TRACE
from fastapi_headroom.probes.queue_adapters.times import READY_AT
from fastapi_headroom.probes.redis_hooks import address_of
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support import cache_counts, taskiq_app
from tests.support.queue_series import MAIL, PUBLISHED, PUBLISHING, RETRIES, RUNS, WAITS, count
from tests.support.taskiq_subjects import TaskiqList
from tests.support.traced import traced


@pytest.fixture
def subject(redis_server: RedisServer, tmp_path: Path) -> TaskiqList:
    """An empty queue."""
    made = TaskiqList(redis_server, tmp_path)
    made.start()
    return made


@contextlib.asynccontextmanager
async def working(subject: TaskiqList) -> AsyncIterator[AsyncBroker]:
    """Publish and run in this process, through the broker's queue."""
    broker = taskiq_app.broker_for("list", subject.server.url)  # type: ignore[attr-defined]
    broker.local_task_registry.update(taskiq_app.broker.local_task_registry)
    running = asyncio.create_task(run_receiver_task(broker, max_async_tasks=1, run_startup=True))
    try:
        yield broker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await broker.shutdown()


async def ran(writer: Writer, runs: float) -> None:
    """Wait until so many runs have ended."""
    async with asyncio.timeout(30):
        while count(writer, f"{RUNS}_count") < runs:
            await asyncio.sleep(0.02)


async def test_a_worker_measures_waits_runs_failures_retries_and_time_outs(
    subject: TaskiqList, measured: Writer
) -> None:
    """Each outcome of a run has its error type, also where a retry hides it; what is sent again is a retry."""
    folder = str(subject.folder)
    async with working(subject) as broker:
        for task, arguments in (
            (taskiq_app.kit, (folder, "again")),
            (taskiq_app.kit, (folder, "fail")),
            (taskiq_app.kit_sync, (folder, "count")),
            (taskiq_app.kit_sync, (folder, "fail")),
            (taskiq_app.sleep, (30.0,)),
            (taskiq_app.once_more, ()),
        ):
            await task.kicker().with_broker(broker).kiq(*arguments)  # type: ignore[attr-defined]
        await ran(measured, 9.0)

    def runs(task: str, error: str) -> float:
        return count(measured, f"{RUNS}_count", **MAIL, headroom_task=task, error_type=error)

    assert (runs("kit", ""), runs("kit", "ConnectionError"), runs("kit", "ValueError")) == (1.0, 2.0, 1.0)
    assert (runs("kit_sync", ""), runs("kit_sync", "ValueError")) == (1.0, 1.0)
    assert runs("sleep", "TimeoutError") == 1.0
    assert 0.2 <= count(measured, f"{RUNS}_sum", headroom_task="sleep") < 5.0
    assert (runs("once_more", "NoResultError"), runs("once_more", "")) == (1.0, 1.0)
    assert count(measured, RETRIES, **MAIL, headroom_task="kit") == 2.0
    assert count(measured, RETRIES, **MAIL, headroom_task="once_more") == 1.0
    assert count(measured, RETRIES) == 3.0
    assert count(measured, f"{WAITS}_count", **MAIL) == 9.0
    assert measured.value(f"{PUBLISHING}_count", **PUBLISHED) == 9.0


async def test_a_wait_runs_from_the_sending(subject: TaskiqList, measured: Writer) -> None:
    """A task that lay in the queue before a worker came has waited that long."""
    await asyncio.to_thread(subject.publish, 2)
    await asyncio.sleep(0.3)
    async with working(subject):
        await ran(measured, 2.0)
    assert 0.6 <= count(measured, f"{WAITS}_sum", **MAIL) < 10.0


def test_publishing_is_timed_and_charged_to_the_request(subject: TaskiqList, measured: Writer) -> None:
    """Handing a task over is counted by queue and is the publish stage of the request's ledger, and no other."""
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


async def test_a_failed_publish_raises_what_it_raised_before(measured: Writer) -> None:
    """Without a broker the app sees the same error as before, and the time it took is counted."""
    broker = ListQueueBroker("redis://127.0.0.1:1/0", queue_name="mail")
    with pytest.raises(SendTaskError):
        await taskiq_app.kit.kicker().with_broker(broker).kiq("x", "count")
    await broker.shutdown()
    assert measured.value(f"{PUBLISHING}_count", **PUBLISHED) == 1.0


async def test_what_is_run_in_place_is_neither_published_nor_counted(measured: Writer) -> None:
    """``InMemoryBroker``, as test suites use it, has no queue."""
    broker = InMemoryBroker(await_inplace=True)

    @broker.task
    async def add(one: int) -> int:
        return one + 1

    result = await (await add.kiq(1)).wait_result()
    assert result.return_value == 2
    assert not any(name.startswith((PUBLISHING, RUNS, WAITS)) for name, _ in measured.samples())


async def test_a_request_and_the_runs_of_its_task_are_one_trace(subject: TaskiqList, measured: Writer) -> None:
    """A task carries the trace context through its retries; each run is a consumer span."""
    with traced() as traces:
        async with working(subject) as broker:
            with traces.tracer.start_as_current_span("request"):
                await taskiq_app.kit.kicker().with_broker(broker).kiq(str(subject.folder), "again")
            await ran(measured, 3.0)
        traces.assert_runs("request", attempts=3)
    await asyncio.to_thread(subject.publish)
    assert TRACE not in json.loads(subject.client.lindex("mail", 0))["labels"]


async def test_results_that_are_polled_for_are_no_look_ups_of_a_cache(subject: TaskiqList, measured: Writer) -> None:
    """Polling for a result, and fetching it, is timed and judges nothing; the app's own client of the same server
    counts as before."""
    url = subject.server.url  # type: ignore[attr-defined]
    writer, probe = Writer.in_memory(), CacheProbe(load({}))
    results = RedisAsyncResultBackend[str](url, keep_results=False)
    async with Redis.from_url(url) as client:
        probe.bind(writer)
        try:
            for _ in range(5):
                assert not await results.is_result_ready("0a1b")
            with pytest.raises(ResultIsMissingError):
                await results.get_result("0a1b")
            assert await results.get_progress("0a1b") is None
            done = TaskiqResult(is_err=False, return_value="sent", execution_time=0.1)
            await results.set_result("0a1b", done)
            assert await results.is_result_ready("0a1b")
            assert (await results.get_result("0a1b")).return_value == "sent"
            cache = address_of(client)
            assert cache_counts.results(writer, cache) == {}
            assert cache_counts.operations(writer, cache) == {"exists": 6.0, "getdel": 2.0, "get": 1.0, "set": 1.0}
            await client.get("plan:1")
            await client.exists("0a1b")
            assert cache_counts.results(writer, cache) == {("plan:{}", "miss"): 1.0, ("{}", "miss"): 1.0}
            assert writer.value("headroom_probe_up", probe="cache") == 1.0
        finally:
            probe.close()
            await results.shutdown()


def test_close_puts_all_back() -> None:
    """The probe attaches once and leaves nothing behind."""

    def patched() -> tuple[Any, ...]:
        return (AsyncKicker.kiq, AsyncKicker._prepare_message, Context.requeue, Receiver.run_task,
                RedisAsyncResultBackend.is_result_ready, RedisAsyncResultBackend.get_result)  # fmt: skip

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


def test_a_broker_that_a_web_app_imports_too_starts_nothing_there(subject: TaskiqList) -> None:
    """``init_worker(broker)`` waits for TaskIQ to start a worker, and a second call adds no second handler."""

    async def start(broker: AsyncBroker) -> None:
        assert first.writer is None, "a client's startup is no worker's"

    broker = taskiq_app.broker_for("list", subject.server.url)  # type: ignore[attr-defined]
    first = headroom.init_worker(broker, exporter=False)
    try:
        installed = {event: len(handlers) for event, handlers in broker.event_handlers.items()}
        headroom.init_worker(broker)
        assert {event: len(handlers) for event, handlers in broker.event_handlers.items()} == installed
        subject.with_broker(start)
    finally:
        first.shutdown()


@pytest.mark.parametrize("size", [0, 200_000])
def test_a_message_tells_its_age(size: int) -> None:
    """The age is by our label; arguments that look like it are not believed, and a message without it does not tell."""
    decoy = {READY_AT: "1.0", "text": f'"{READY_AT}":"1.0"', "large": "x" * size}
    ready = time.time() - 5
    labels = {READY_AT: f"{ready:.6f}"}
    message = TaskiqMessage(task_id="1", task_name="kit", labels=labels, args=[decoy], kwargs=decoy)
    assert ready_since(message.model_dump_json().encode()) == pytest.approx(ready, abs=0.001)
    assert ready_since(b"\x80\x05pickled") is None
    if not size:
        message.labels.clear()
        assert ready_since(message.model_dump_json().encode()) is None


def test_a_group_comes_from_the_url_and_the_default_queue_needs_no_name(
    redis_server: RedisServer, subject: TaskiqList
) -> None:
    """A stream is read for its consumer group of that name; without ``queues=`` TaskIQ's default queue is polled."""
    client = subject.client
    for group in ("taskiq", "shop"):
        client.xgroup_create("taskiq", group, id="0", mkstream=True)
    client.xadd("taskiq", {"data": "x"})
    client.xreadgroup("shop", "one", {"taskiq": ">"})

    def state(parameters: str) -> dict[str, tuple[str, float]]:
        rows = poller_for(f"taskiq+{redis_server.url}{parameters}").poll()
        return {metric.name: (labels[1], value) for metric, labels, value in rows}

    assert state("")["headroom_queue_depth"] == ("taskiq", 1.0)
    assert state("?group=shop")["headroom_queue_depth"] == ("taskiq", 0.0)
    assert state("?group=shop")["headroom_queue_in_progress"] == ("taskiq", 1.0)
