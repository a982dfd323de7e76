"""AnyIO's threadpool: tokens, and the wait for one, in the histogram and in the request's ledger."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
import types

import anyio
import pytest
from anyio import CapacityLimiter, to_thread
from anyio._backends._asyncio import AsyncIOBackend
from starlette.concurrency import run_in_threadpool

from fastapi_headroom import ledger
from tests.probes.loops import RUNS, Run, measured, until
from tests.support.measured import best_of

pytestmark = pytest.mark.alone

WAIT = "headroom_threadpool_wait_seconds"
TOKENS = "headroom_threadpool_tokens"


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def test_wait_for_a_token(run: Run) -> None:
    """With one token, the second of two sync calls of 100 ms waits 100 ms: in the histogram and in its ledger."""

    async def call() -> float:
        books = ledger.Ledger("GET")
        ledger.current.set(books)
        await run_in_threadpool(time.sleep, 0.1)
        books.finish(time.perf_counter())
        return books.seconds[ledger.THREADPOOL_WAIT]

    async def main() -> list[float]:
        async with measured() as (writer, _):
            to_thread.current_default_thread_limiter().total_tokens = 1
            waits = sorted(await asyncio.gather(call(), call()))
            assert writer.value(f"{WAIT}_count") == 2
            assert writer.value(f"{WAIT}_sum") == pytest.approx(sum(waits), abs=0.005)
            return waits

    first, second = best_of(lambda: run(main()), lambda waits: waits[0] < 0.05 and abs(waits[1] - 0.1) <= 0.04)
    assert first < 0.05
    assert second == pytest.approx(0.1, abs=0.04)


def test_tokens(run: Run) -> None:
    """Tokens in use, the limit, and tasks that wait are written within about a second."""

    async def main() -> None:
        async with measured() as (writer, _):
            to_thread.current_default_thread_limiter().total_tokens = 2
            release = threading.Event()
            calls = [asyncio.create_task(run_in_threadpool(release.wait, 10)) for _ in range(5)]
            try:
                await until(lambda: writer.value(TOKENS, state="waiting") == 3)
                assert writer.value(TOKENS, state="used") == 2
                assert writer.value(TOKENS, state="limit") == 2
            finally:
                release.set()
                await asyncio.gather(*calls)
            await until(lambda: writer.value(TOKENS, state="used") == 0)

    run(main())


def test_other_limiters_are_not_counted(run: Run) -> None:
    """A call with a limiter of its own works as ever, and is no wait for the default pool's threads."""

    async def main() -> None:
        async with measured() as (writer, _):
            limiter = CapacityLimiter(1)
            result = await to_thread.run_sync(lambda: limiter.borrowed_tokens, limiter=limiter)
            assert (result, limiter.borrowed_tokens) == (1, 0)
            assert writer.value(f"{WAIT}_count") == 0

    run(main())


def test_cancelled_wait_gives_nothing_away(run: Run) -> None:
    """A wait that is cancelled raises as ever, leaves the stage, and the next caller gets the token."""

    async def main() -> None:
        async with measured():
            to_thread.current_default_thread_limiter().total_tokens = 1
            books = ledger.Ledger("GET")
            ledger.current.set(books)
            release = threading.Event()
            first = asyncio.create_task(run_in_threadpool(release.wait, 10))
            await asyncio.sleep(0.02)
            with anyio.move_on_after(0.05) as scope:
                await run_in_threadpool(time.sleep, 0)
            assert scope.cancelled_caught
            assert books.waits.count(ledger.THREADPOOL_WAIT) == 0
            release.set()
            await first
            assert await run_in_threadpool(lambda: "served") == "served"

    run(main())


def test_entry_is_put_back() -> None:
    """After close AnyIO's entry to the pool is the very object that it was."""
    before = vars(AsyncIOBackend)["run_sync_in_worker_thread"]

    async def main() -> None:
        async with measured():
            assert vars(AsyncIOBackend)["run_sync_in_worker_thread"] is not before

    asyncio.run(main())
    assert vars(AsyncIOBackend)["run_sync_in_worker_thread"] is before


def test_tokens_where_sniffio_is_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnyIO asks sniffio, where that is installed, for the running library, and sniffio knows none outside a task."""

    class NotFoundError(RuntimeError):
        pass

    def current() -> str:
        if name := sniffio.current_async_library_cvar.get():
            return name
        if asyncio.current_task() is None:
            raise NotFoundError
        return "asyncio"

    sniffio = types.SimpleNamespace(
        current_async_library=current,
        current_async_library_cvar=contextvars.ContextVar("library", default=""),
        AsyncLibraryNotFoundError=NotFoundError,
    )
    monkeypatch.setitem(sys.modules, "sniffio", sniffio)
    monkeypatch.setattr("anyio._core._eventloop.sniffio", sniffio)

    async def main() -> None:
        async with measured() as (writer, _):
            await until(lambda: (TOKENS, (("state", "limit"),)) in writer.samples())
            assert writer.value(TOKENS, state="limit") == 40

    run(main())
