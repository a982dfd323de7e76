"""Where a request's time went: the wait ledger behind real apps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import anyio
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware

from fastapi_headroom import ledger
from tests.support.measured import Measured, best_of, busy, uvicorn_serving

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("middleware", [False, True], ids=["bare", "behind-middleware"])
async def test_code_that_holds_the_loop_is_found(measure: Callable[..., Measured], middleware: bool) -> None:
    """A handler that computes for 100 ms shows 90 ms or more on_loop, behind a BaseHTTPMiddleware too."""
    app, held = FastAPI(), 0.0

    @app.get("/busy")
    async def handler() -> str:
        nonlocal held
        began = time.perf_counter()
        busy(0.1)
        held = time.perf_counter() - began
        return "ok"

    if middleware:

        @app.middleware("http")
        async def passing(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    measured = measure(app)
    began = time.perf_counter()
    await measured.get("/busy")
    rest = time.perf_counter() - began - held  # some milliseconds, where nobody takes the CPU
    stages = measured.stages("/busy")
    assert held - 0.001 <= stages["on_loop"] <= held + rest
    assert stages.get("other", 0.0) <= rest
    assert sum(stages.values()) == pytest.approx(measured.seconds("/busy"), abs=0.001)
    assert held - 0.001 <= measured.value("headroom_request_loop_hold_seconds_sum", http_route="/busy") <= held + rest


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_both_loops_tell_computing_from_waiting(
    measure: Callable[..., Measured], loop: Literal["asyncio", "uvloop"]
) -> None:
    """Behind a BaseHTTPMiddleware under uvicorn 50 ms of computing and 50 ms of sleep are told apart on either loop."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    app, held, slept = FastAPI(), 0.0, 0.0

    @app.get("/")
    async def handler() -> str:
        nonlocal held, slept
        began = time.perf_counter()
        busy(0.05)
        held = time.perf_counter() - began
        await asyncio.sleep(0.05)
        slept = time.perf_counter() - began - held
        return "ok"

    app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    measured = measure(app)
    served = 0

    def one_request() -> tuple[float, float]:
        """Return by how much on_loop and other differ from what the handler computed and slept."""
        nonlocal served
        before, served = measured.stages("/"), served + 1
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        after = measured.stages_of("/", served)
        return after["on_loop"] - before.get("on_loop", 0.0) - held, after["other"] - before.get("other", 0.0) - slept

    def right(off: tuple[float, float]) -> bool:
        return -0.001 <= off[0] < 0.05 and -0.005 <= off[1] < 0.05

    with uvicorn_serving(app, loop) as port:
        off = best_of(one_request, right)
    assert right(off), off


async def test_a_wait_that_nobody_claims_is_other(measure: Callable[..., Measured]) -> None:
    """100 ms of asyncio.sleep are `other`, and the stages sum to the duration."""
    app, slept = FastAPI(), 0.0

    @app.get("/sleep")
    async def handler() -> str:
        nonlocal slept
        began = time.perf_counter()
        await asyncio.sleep(0.1)
        slept = time.perf_counter() - began
        return "ok"

    measured = measure(app)
    await measured.get("/sleep")
    stages = measured.stages("/sleep")
    rest = measured.seconds("/sleep") - slept  # some milliseconds, where nobody takes the CPU
    assert slept - 0.005 <= stages["other"] <= slept + rest
    assert stages["on_loop"] <= rest + 0.005
    assert sum(stages.values()) == pytest.approx(measured.seconds("/sleep"), abs=0.001)


async def test_overlapping_waits_sum_to_the_wall_time(measure: Callable[..., Measured]) -> None:
    """Five waits of 50 ms under gather, two of the cache and three of the database, share 50 ms."""
    app, waited = FastAPI(), 0.0

    async def wait(stage: int) -> None:
        request = ledger.current.get()
        assert request is not None
        request.enter(stage)
        await asyncio.sleep(0.05)
        request.leave(stage)

    @app.get("/gather")
    async def handler() -> str:
        nonlocal waited
        began = time.perf_counter()
        await asyncio.gather(*(wait(stage) for stage in [ledger.DB] * 3 + [ledger.CACHE] * 2))
        waited = time.perf_counter() - began
        return "ok"

    measured = measure(app)
    await measured.get("/gather")
    stages = measured.stages("/gather")
    assert waited - 0.02 <= stages["db"] + stages["cache"] <= waited
    assert stages["db"] == pytest.approx(1.5 * stages["cache"], rel=0.3)
    assert sum(stages.values()) == pytest.approx(measured.seconds("/gather"), abs=0.001)


async def test_tasks_of_a_request_count_as_its_own_code(measure: Callable[..., Measured]) -> None:
    """Computing in tasks that the handler gathers is on_loop, and a task factory of the user's is still called."""
    made: list[str] = []

    def users(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)

    app = FastAPI()

    held = 0.0

    async def part() -> None:
        nonlocal held
        await asyncio.sleep(0)
        began = time.perf_counter()
        busy(0.03)
        held += time.perf_counter() - began

    @app.get("/gather")
    async def handler() -> str:
        await asyncio.gather(part(), part())
        return "ok"

    loop = asyncio.get_running_loop()
    loop.set_task_factory(users)
    try:
        measured = measure(app)
        await measured.get("/gather")
        assert len([name for name in made if name.endswith("part")]) == 2
        measured.probe.close()
        assert loop.get_task_factory() is users
    finally:
        loop.set_task_factory(None)
    rest = measured.seconds("/gather") - held  # some milliseconds, where nobody takes the CPU
    assert held - 0.001 <= measured.stages("/gather")["on_loop"] <= held + rest


async def test_the_ledger_is_found_in_threads_and_knows_the_route(measure: Callable[..., Measured]) -> None:
    """Hooks in a sync endpoint's thread find the request's ledger with its route and method."""
    app = FastAPI()

    @app.get("/sync/{x}")
    def handler(x: str) -> list[str]:
        request = ledger.current.get()
        assert request is not None
        request.queries += 3
        return [request.route, request.method]

    measured = measure(app)
    assert (await measured.get("/sync/1")).json() == ["/sync/{x}", "GET"]
    assert ledger.current.get() is None
    assert measured.value("headroom_request_queries_sum", http_route="/sync/{x}") == 3


# ------------------------------------------------------------------ the stages sum to the duration, whatever happens
def shapes() -> FastAPI:
    """Return an app with a route for each way in which a request can be served."""
    app = FastAPI()
    mounted = FastAPI()

    async def work() -> None:
        busy(0.01)
        await asyncio.sleep(0.01)

    async def wait(stage: int, seconds: float) -> None:
        request = ledger.current.get()
        assert request is not None
        request.enter(stage)
        try:
            await asyncio.sleep(seconds)
        finally:
            request.leave(stage)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            await work()
            yield b"piece"

    async def after() -> None:
        busy(0.05)
        await asyncio.sleep(0.05)

    async def failing_dependency() -> None:
        await work()
        raise LookupError("dependency")

    async def closing_dependency() -> AsyncIterator[None]:
        await work()
        yield
        await work()

    @app.get("/gather")
    async def gather() -> None:
        await asyncio.gather(work(), wait(ledger.DB, 0.03), wait(ledger.CACHE, 0.05), work())

    @app.get("/group")
    async def group() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            tasks.start_soon(wait, ledger.DB, 0.03)

    @app.get("/outliving")
    async def outliving() -> None:
        kept.append(asyncio.create_task(after()))
        kept.append(asyncio.create_task(wait(ledger.DB, 0.1)))
        await work()

    @app.get("/cancelled")
    async def cancelled() -> None:
        with anyio.move_on_after(0.03):
            await wait(ledger.DB, 10)
        task = asyncio.create_task(wait(ledger.CACHE, 10))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    @app.get("/raising")
    async def raising() -> None:
        await work()
        raise ValueError("handler")

    @app.get("/dependency", dependencies=[Depends(failing_dependency)])
    async def dependency() -> None:
        pass

    @app.get("/yielding", dependencies=[Depends(closing_dependency)])
    async def yielding() -> None:
        await work()

    @app.get("/sync")
    def sync() -> None:
        request = ledger.current.get()
        assert request is not None
        time.sleep(0.02)
        request.enter(ledger.DB)
        time.sleep(0.02)
        request.leave(ledger.DB)

    @app.get("/thread")
    async def thread() -> None:
        await asyncio.gather(run_in_threadpool(time.sleep, 0.03), work())

    @app.get("/streaming")
    async def streaming() -> StreamingResponse:
        return StreamingResponse(pieces())

    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(__file__)

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(after)
        await work()

    @mounted.get("/inner")
    async def inner() -> None:
        await work()
        await wait(ledger.DB, 0.01)

    app.mount("/mounted", mounted)
    kept: list[asyncio.Task[None]] = []
    return app


@pytest.mark.parametrize("middleware", [False, True], ids=["bare", "behind-middleware"])
@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize(
    "path",
    [
        *("gather", "group", "outliving", "cancelled", "raising", "dependency", "yielding", "sync", "thread"),
        *("streaming", "file", "background", "mounted/inner"),
    ],
)
async def test_the_stages_sum_to_the_duration(
    measure: Callable[..., Measured], path: str, held: bool, middleware: bool
) -> None:
    """However a request is served, on a free loop and on one that others hold, its stages sum to its duration."""
    app = shapes()
    if middleware:

        @app.middleware("http")
        async def passing(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            await asyncio.sleep(0.001)
            return await call_next(request)

    @app.get("/holding")
    async def holding() -> None:
        for _ in range(5):
            busy(0.012)
            await asyncio.sleep(0.002)

    measured = measure(app)
    async with measured.client() as client:
        others = [client.get("/holding") for _ in range(2 if held else 0)]
        began = time.perf_counter()
        answer, *_ = await asyncio.gather(client.get(f"/{path}"), *others)
        whole = time.perf_counter() - began
    assert answer.status_code == (500 if path in ("raising", "dependency") else 200)
    stages = measured.stages(f"/{path}")
    duration = measured.seconds(f"/{path}")
    assert 0 < duration < whole
    assert sum(stages.values()) == pytest.approx(duration, rel=0.01, abs=0.001)
    assert min(stages.values()) >= 0.0
    if not held:
        assert stages.get("loop_blocked", 0.0) < 0.03 + whole / 4, "nobody else held the loop"


async def test_a_client_that_goes_away_leaves_books_that_sum(measure: Callable[..., Measured]) -> None:
    """A request that is cancelled because its client went has stages that sum to its duration."""
    app, waits = FastAPI(), asyncio.Event()

    @app.get("/")
    async def handler() -> None:
        request = ledger.current.get()
        assert request is not None
        request.enter(ledger.DB)
        waits.set()
        await asyncio.sleep(10)

    measured = measure(app)
    task = asyncio.create_task(measured.get("/"))
    await waits.wait()
    began = time.perf_counter()
    await asyncio.sleep(0.05)
    waited = time.perf_counter() - began
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    stages = measured.stages("/")
    assert waited - 0.005 <= stages["db"] <= measured.seconds("/")
    assert sum(stages.values()) == pytest.approx(measured.seconds("/"), abs=0.001)


async def test_a_request_in_a_thread_is_blocked_by_who_holds_the_loop(measure: Callable[..., Measured]) -> None:
    """A sync endpoint whose thread is done after 30 ms, on a loop held for 300 ms, has the rest as loop_blocked."""
    app, truth = FastAPI(), dict[str, float]()

    @app.get("/sync")
    def sync() -> None:
        request = ledger.current.get()
        assert request is not None
        began = time.perf_counter()
        request.enter(ledger.DB)
        time.sleep(0.03)
        request.leave(ledger.DB)
        truth["done"] = time.perf_counter()
        truth["db"] = truth["done"] - began

    @app.get("/holding")
    async def holding() -> None:
        await asyncio.sleep(0.01)
        truth["held from"] = time.perf_counter()
        busy(0.3)
        truth["held to"] = time.perf_counter()

    measured = measure(app)
    await measured.get("/sync")  # the first one starts the thread
    before = measured.stages("/sync")
    async with measured.client() as client:
        await asyncio.gather(client.get("/sync"), client.get("/holding"))
    stages = measured.stages("/sync")
    blocked = truth["held to"] - max(truth["done"], truth["held from"])
    assert stages["loop_blocked"] - before.get("loop_blocked", 0.0) == pytest.approx(blocked, abs=0.08)
    assert stages["db"] - before["db"] == pytest.approx(truth["db"], abs=0.08)


async def test_background_tasks_hold_the_loop_for_others(measure: Callable[..., Measured]) -> None:
    """What a request computes after its response is not its own time, but others are blocked by it."""
    app, truth = FastAPI(), dict[str, float]()

    async def after() -> None:
        await asyncio.sleep(0.005)
        truth["held from"] = time.perf_counter()
        busy(0.2)
        truth["held to"] = time.perf_counter()

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(after)

    @app.get("/waiting")
    async def waiting() -> None:
        truth["due"] = time.perf_counter() + 0.03
        await asyncio.sleep(0.03)

    measured = measure(app)
    async with measured.client() as client:
        await asyncio.gather(client.get("/background"), client.get("/waiting"))
    blocked = truth["held to"] - max(truth["due"], truth["held from"])
    assert measured.stages("/waiting")["loop_blocked"] == pytest.approx(blocked, abs=0.05)
    assert measured.seconds("/background") < 0.19  # less than it held the loop for
