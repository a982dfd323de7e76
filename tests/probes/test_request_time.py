"""Where a request's time went: the wait ledger behind real apps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.middleware.base import BaseHTTPMiddleware

from fastapi_headroom import ledger
from tests.support.measured import Measured, busy, eventually, uvicorn_serving


@pytest.mark.parametrize("middleware", [False, True], ids=["bare", "behind-middleware"])
async def test_code_that_holds_the_loop_is_found(measure: Callable[..., Measured], middleware: bool) -> None:
    """A handler that computes for 100 ms shows 90 ms or more on_loop, behind a BaseHTTPMiddleware too."""
    app = FastAPI()

    @app.get("/busy")
    async def handler() -> str:
        busy(0.1)
        return "ok"

    if middleware:

        @app.middleware("http")
        async def passing(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    measured = measure(app)
    await measured.get("/busy")
    stages = measured.stages("/busy")
    assert 0.09 <= stages["on_loop"] < 0.19
    assert stages.get("other", 0.0) < 0.09
    assert sum(stages.values()) == pytest.approx(measured.seconds("/busy"), abs=0.001)
    assert 0.09 <= measured.value("headroom_request_loop_hold_seconds_sum", http_route="/busy") < 0.19


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_both_loops_tell_computing_from_waiting(
    measure: Callable[..., Measured], loop: Literal["asyncio", "uvloop"]
) -> None:
    """Behind a BaseHTTPMiddleware under uvicorn 50 ms of computing and 50 ms of sleep are told apart on either loop."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    app = FastAPI()

    @app.get("/")
    async def handler() -> str:
        busy(0.05)
        await asyncio.sleep(0.05)
        return "ok"

    app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    measured = measure(app)
    with uvicorn_serving(app, loop) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        eventually(lambda: measured.stages("/"))
    stages = measured.stages("/")
    assert 0.05 <= stages["on_loop"] < 0.14
    assert 0.045 <= stages["other"] < 0.14
    assert sum(stages.values()) == pytest.approx(measured.seconds("/"), abs=0.001)


async def test_a_wait_that_nobody_claims_is_other(measure: Callable[..., Measured]) -> None:
    """100 ms of asyncio.sleep are `other`, and the stages sum to the duration."""
    app = FastAPI()

    @app.get("/sleep")
    async def handler() -> str:
        await asyncio.sleep(0.1)
        return "ok"

    measured = measure(app)
    await measured.get("/sleep")
    stages = measured.stages("/sleep")
    assert 0.095 <= stages["other"] < 0.19
    assert stages["on_loop"] < 0.09
    assert sum(stages.values()) == pytest.approx(measured.seconds("/sleep"), abs=0.001)


async def test_overlapping_waits_sum_to_the_wall_time(measure: Callable[..., Measured]) -> None:
    """Five waits of 50 ms under gather, two of the cache and three of the database, share 50 ms."""
    app = FastAPI()

    async def wait(stage: int) -> None:
        request = ledger.current.get()
        assert request is not None
        request.enter(stage)
        await asyncio.sleep(0.05)
        request.leave(stage)

    @app.get("/gather")
    async def handler() -> str:
        await asyncio.gather(*(wait(stage) for stage in [ledger.DB] * 3 + [ledger.CACHE] * 2))
        return "ok"

    measured = measure(app)
    await measured.get("/gather")
    stages = measured.stages("/gather")
    assert 0.03 <= stages["db"] + stages["cache"] < 0.14
    assert stages["db"] == pytest.approx(1.5 * stages["cache"], rel=0.3)
    assert sum(stages.values()) == pytest.approx(measured.seconds("/gather"), abs=0.001)


async def test_tasks_of_a_request_count_as_its_own_code(measure: Callable[..., Measured]) -> None:
    """Computing in tasks that the handler gathers is on_loop, and a task factory of the user's is still called."""
    made: list[str] = []

    def users(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)

    app = FastAPI()

    async def part() -> None:
        await asyncio.sleep(0)
        busy(0.03)

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
    assert 0.06 <= measured.stages("/gather")["on_loop"] < 0.15


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
