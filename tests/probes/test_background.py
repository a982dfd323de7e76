"""Starlette's BackgroundTasks, run by a real app."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI
from starlette.background import BackgroundTask

import fastapi_headroom as headroom
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

RUNNING, DURATION = "headroom_background_tasks", "headroom_background_task_duration_seconds"
WAIT, FAILURES = "headroom_background_task_wait_seconds", "headroom_background_task_failures_total"
PREFIX = f"{__name__}."


async def notify(started: asyncio.Event, release: asyncio.Event) -> None:
    """Run until released."""
    started.set()
    await release.wait()


def write_log(text: str) -> None:
    """Run on a thread."""


async def break_down() -> None:
    """Fail."""
    raise ConnectionError("mail server")


async def test_tasks_of_a_request_are_counted_while_they_run_and_timed(measured: Writer) -> None:
    """A running task shows in the gauge under its function's name, and in the histogram once it is done."""
    started, release = asyncio.Event(), asyncio.Event()
    app = FastAPI()

    @app.get("/")
    async def root(tasks: BackgroundTasks) -> None:
        tasks.add_task(notify, started, release)
        tasks.add_task(functools.partial(write_log, "done"))

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        request = asyncio.create_task(client.get("/"))
        await asyncio.wait_for(started.wait(), 5)
        assert measured.value(RUNNING, headroom_task=PREFIX + "notify") == 1.0
        begun = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)  # the run time that the histogram has to show
        release.set()
        assert (await request).status_code == 200
        held = asyncio.get_running_loop().time() - begun
    assert measured.value(RUNNING, headroom_task=PREFIX + "notify") == 0.0
    assert measured.value(f"{DURATION}_count", headroom_task=PREFIX + "notify") == 1.0
    assert 0.05 <= measured.value(f"{DURATION}_sum", headroom_task=PREFIX + "notify") < held + 0.1
    assert measured.value(f"{DURATION}_count", headroom_task=PREFIX + "write_log") == 1.0


async def test_an_error_of_a_task_passes_through(measured: Writer) -> None:
    """A task that fails raises the same error as before, is timed, and runs no longer."""
    with pytest.raises(ConnectionError, match="mail server"):
        await BackgroundTask(break_down)()
    assert measured.value(RUNNING, headroom_task=PREFIX + "break_down") == 0.0
    assert measured.value(f"{DURATION}_count", headroom_task=PREFIX + "break_down") == 1.0


async def rest(seconds: float) -> None:
    """Take so long."""
    await asyncio.sleep(seconds)


async def test_a_task_waits_for_the_rest_of_its_request_and_for_the_tasks_before_it(
    measured: Writer, tmp_path: Path
) -> None:
    """The wait runs from when the request made the task; a failure is counted and those behind it never run."""
    app, always = FastAPI(), BackgroundTask(rest, 0)
    handle = headroom.init(app, directory=tmp_path, exporter=False, disable=["queue"])

    @app.get("/")
    async def root(tasks: BackgroundTasks) -> None:
        tasks.add_task(rest, 0.1)
        tasks.add_task(write_log, "done")
        await asyncio.sleep(0.05)  # the request goes on
        tasks.add_task(break_down)
        tasks.add_task(notify, asyncio.Event(), asyncio.Event())

    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            with pytest.raises(ConnectionError, match="mail server"):
                await client.get("/")
        await always()
    finally:
        handle.shutdown()

    def value(name: str, task: str) -> float:
        return measured.value(name, headroom_task=PREFIX + task)

    assert (value(f"{WAIT}_count", "rest"), value(f"{DURATION}_count", "rest")) == (1.0, 2.0)
    assert 0.05 <= value(f"{WAIT}_sum", "rest") < 0.1 + value(f"{DURATION}_sum", "rest")
    assert value(f"{WAIT}_sum", "write_log") >= value(f"{WAIT}_sum", "rest") + 0.1
    assert (value(FAILURES, "break_down"), value(FAILURES, "rest")) == (1.0, 0.0)
    assert f"{PREFIX}notify" not in {dict(labels).get("headroom_task") for _, labels in measured.samples()}


async def test_functions_made_on_the_fly_fill_no_label(measured: Writer) -> None:
    """After a hundred function names further ones share one label value."""

    def make(number: int) -> BackgroundTask:
        async def task() -> None: ...

        task.__qualname__ = f"task_{number}"
        return BackgroundTask(task)

    for number in range(105):
        await make(number)()
    assert measured.value(f"{DURATION}_count", headroom_task=PREFIX + "task_99") == 1.0
    assert measured.value(f"{DURATION}_count", headroom_task="_OTHER") == 5.0


async def test_close_puts_the_original_back_and_a_wrapper_above_ours_keeps_working() -> None:
    """Closing restores Starlette's own method; under a foreign wrapper ours only passes through."""
    original, made = BackgroundTask.__call__, BackgroundTask.__init__
    probe, writer = QueueProbe(load({})), Writer.in_memory()
    probe.bind(writer)
    assert BackgroundTask.__call__ is not original
    probe.close()
    assert (BackgroundTask.__call__, BackgroundTask.__init__) == (original, made)

    probe.bind(writer)
    ours = BackgroundTask.__call__

    async def foreign(task: BackgroundTask) -> None:
        await ours(task)

    BackgroundTask.__call__ = foreign  # type: ignore[method-assign, assignment]
    try:
        probe.close()
        before = writer.samples()
        await BackgroundTask(write_log, "still runs")()
        assert writer.samples() == before
    finally:
        BackgroundTask.__call__ = original  # type: ignore[method-assign]
