"""The ledger's stages ``threadpool_wait`` and ``threadpool``: sync endpoints and what they wait for in their thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy
from anyio import to_thread
from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from demo_app.stack.servers import Postgres
from fastapi_headroom import ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.executor import timed_submit
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.threadpool import Threadpool
from fastapi_headroom.settings import Settings
from tests.support.measured import Measured, best_of, busy, eventually, uvicorn_serving

pytestmark = pytest.mark.alone

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@contextmanager
def serving(
    measured: Measured, loop: Any = "asyncio", tokens: int | None = None, on_wait: Callable[[], Any] | None = None
) -> Iterator[str]:
    """Serve a measured app with its threadpool measured as well; yield its address.

    ``on_wait`` is called when the request for ``/wait`` arrives.
    """
    guard = Guard("loop")
    guard.bind(measured.writer)
    pool = Threadpool(guard)
    pool.bind(measured.writer)

    async def limited(scope: Any, receive: Any, send: Any) -> None:
        if tokens is not None:
            to_thread.current_default_thread_limiter().total_tokens = tokens
        if on_wait is not None and scope.get("path") == "/wait":
            on_wait()
        await measured.app(scope, receive, send)

    try:
        with uvicorn_serving(limited, loop) as port:
            yield f"http://127.0.0.1:{port}"
        assert measured.value("headroom_probe_errors_total", probe="loop") == 0, "a hook failed"
    finally:
        pool.close()


def fetch(measured: Measured, url: str, path: str) -> dict[str, float]:
    """Fetch once and return the stages of that request."""
    before, requests = measured.stages(path), measured.requests(path)
    assert httpx.get(url + path).status_code == 200
    after = measured.stages_of(path, requests + 1)
    return {stage: seconds - before.get(stage, 0.0) for stage, seconds in after.items()}


@LOOPS
@pytest.mark.parametrize("how", ["endpoint", "dependency", "run_in_threadpool", "to_thread", "executor"])
def test_time_in_a_thread_is_the_stage_threadpool(measure: Callable[..., Measured], loop: str, how: str) -> None:
    """200 ms in a thread, however a handler comes to it, are 180 to 230 ms of the stage threadpool."""
    app = FastAPI()
    executor = ThreadPoolExecutor(1)

    def work() -> str:
        time.sleep(0.1)
        busy(0.1)
        return "done"

    async def handler() -> str:
        if how == "run_in_threadpool":
            return await run_in_threadpool(work)
        if how == "to_thread":
            return await asyncio.to_thread(work)
        if how == "executor":
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        return "nothing to do"

    dependencies = [Depends(work)] if how == "dependency" else []
    app.get("/work", dependencies=dependencies)(work if how == "endpoint" else handler)
    measured = measure(app)
    with serving(measured, loop) as url:
        best = best_of(
            lambda: fetch(measured, url, "/work"), lambda one: one["threadpool"] <= 0.23 and one["other"] < 0.05
        )
    executor.shutdown()
    assert 0.18 <= best["threadpool"] <= 0.23, best
    assert best["other"] < 0.05


@LOOPS
def test_waiting_for_a_token_is_not_time_in_the_thread(measure: Callable[..., Measured], loop: str) -> None:
    """A sync endpoint that waits 200 ms for the only token shows that as threadpool_wait."""
    app = FastAPI()
    release, taken = threading.Event(), threading.Event()

    @app.get("/keep")
    def keep() -> None:
        taken.set()
        release.wait(10)

    @app.get("/wait")
    def wait() -> None:
        pass

    measured = measure(app)

    def one_wait() -> dict[str, float]:
        release.clear(), taken.clear()
        keeper = threading.Thread(target=httpx.get, args=[url + "/keep"])
        keeper.start()
        assert taken.wait(5)
        stages = fetch(measured, url, "/wait")
        keeper.join()
        return stages

    with serving(measured, loop, tokens=1, on_wait=lambda: threading.Timer(0.2, release.set).start()) as url:
        stages = best_of(
            one_wait,
            lambda one: (
                0.17 <= one["threadpool_wait"] <= 0.26 and one.get("threadpool", 0.0) < 0.05 and one["other"] < 0.05
            ),
        )
    assert 0.17 <= stages["threadpool_wait"] <= 0.26, stages
    assert stages.get("threadpool", 0.0) < 0.05
    assert stages["other"] < 0.05


def test_a_query_in_a_thread_is_db(measure: Callable[..., Measured], postgres: Postgres) -> None:
    """100 ms of a synchronous query in a sync endpoint are db, and the 100 ms of computing around it threadpool."""
    app = FastAPI()
    engine = sqlalchemy.create_engine(postgres.url(driver="psycopg"))

    @app.get("/query")
    def query() -> None:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("select pg_sleep(0.1)"))
        busy(0.1)

    measured = measure(app)
    probe = PoolProbe(Settings())
    probe.bind(measured.writer)
    try:
        with engine.connect():
            pass  # connecting is no part of what is measured
        with serving(measured) as url:
            stages = best_of(
                lambda: fetch(measured, url, "/query"), lambda one: one["db"] < 0.19 and one["threadpool"] < 0.19
            )
    finally:
        probe.close()
        engine.dispose()
    assert 0.1 <= stages["db"] < 0.19, stages
    assert 0.095 <= stages["threadpool"] < 0.19, stages


def test_files_are_read_in_threads(measure: Callable[..., Measured], tmp_path: Path) -> None:
    """What a FileResponse takes to read its file is the stage threadpool, and the stages sum to the duration."""
    app = FastAPI()
    file = tmp_path / "file"
    file.write_bytes(bytes(8_000_000))

    @app.get("/file")
    async def send() -> FileResponse:
        return FileResponse(file)

    measured = measure(app)
    with serving(measured) as url:
        stages = best_of(lambda: fetch(measured, url, "/file"), lambda one: one["threadpool"] > one["other"])
    assert stages["threadpool"] > 0.001, stages
    assert stages["threadpool"] > stages["other"], stages


async def test_a_job_cancelled_in_the_queue_leaves_its_wait() -> None:
    """A job that is cancelled before a thread took it leaves no wait open; its neighbour runs as ever."""

    class Executor(ThreadPoolExecutor):
        submit = timed_submit(ThreadPoolExecutor.submit, Guard("loop"))

    books = ledger.Ledger("GET")
    ledger.current.set(books)
    release = threading.Event()
    with Executor(1) as executor:
        running = executor.submit(release.wait, 10)
        queued = executor.submit(time.sleep, 0)
        eventually(lambda: sorted(books.waits) == [ledger.THREADPOOL_WAIT, ledger.THREADPOOL])
        assert queued.cancel()
        assert books.waits == [ledger.THREADPOOL]
        release.set()
        assert running.result(5) is True
    assert books.waits == []


def test_the_executor_is_put_back() -> None:
    """After close the standard library's executor is the very object that it was."""
    before = vars(ThreadPoolExecutor)["submit"]
    pool = Threadpool(Guard("loop"))
    measured = Measured(FastAPI())
    pool.bind(measured.writer)
    assert vars(ThreadPoolExecutor)["submit"] is not before
    pool.close()
    assert vars(ThreadPoolExecutor)["submit"] is before
