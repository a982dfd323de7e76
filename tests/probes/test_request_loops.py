"""One app on several event loops, one after the other and at once: every request is counted, and driven."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
import uvloop
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_headroom.ledger import current, in_flight
from fastapi_headroom.store.writer import Writer
from tests.support.measured import Measured

REQUESTS = "headroom_requests_total"
OK = {"http_route": "/task", "outcome": "ok"}
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def make_app() -> FastAPI:
    """Return an app that tells whether a task of the request is driven."""
    app = FastAPI()

    async def is_driven() -> bool:
        ledger = current.get()
        return ledger is not None and ledger.stepping

    @app.get("/task")
    async def task() -> bool:
        await asyncio.sleep(0)
        return await asyncio.create_task(is_driven())

    return app


async def ask(app: Any, count: int = 1) -> list[bool]:
    """Return what some requests, one after the other, told."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return [(await client.get("/task")).json() for _ in range(count)]


@pytest.mark.parametrize("runs", [(asyncio.run,), (uvloop.run,), (asyncio.run, uvloop.run)])
def test_each_new_loop_is_measured(measure: Callable[..., Measured], runs: tuple[Run, ...]) -> None:
    """Under one call of ``run`` after the other each first request is counted, and its tasks are driven."""
    measured = measure(make_app())
    for _ in range(5):
        for run in runs:
            assert run(ask(measured.app, 2)) == [True, True]
    assert measured.value(REQUESTS, **OK) == 10 * len(runs)
    assert not in_flight


def test_test_clients_in_turn_are_measured(measure: Callable[..., Measured]) -> None:
    """A client with a loop for all its requests, and one with a loop for each, both again and again."""
    measured = measure(make_app())
    one_each = TestClient(measured.app)
    for _ in range(5):
        with TestClient(measured.app) as client:
            assert client.get("/task").json() is True
            assert client.get("/task").json() is True
        assert one_each.get("/task").json() is True
    assert measured.value(REQUESTS, **OK) == 15


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_loops_that_are_stopped_and_started_are_measured(
    measure: Callable[..., Measured], new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Two loops that run by turns are both measured: the one that stands still is not taken for the one that runs."""
    measured = measure(make_app())
    loops = [new_loop(), new_loop()]
    try:
        for _ in range(5):
            for loop in loops:
                assert loop.run_until_complete(ask(measured.app)) == [True]
    finally:
        for loop in loops:
            loop.close()
    assert measured.value(REQUESTS, **OK) == 10


def test_loops_at_once_count_all_requests(measure: Callable[..., Measured]) -> None:
    """Of threads that each have a loop no request is lost, and the loop that is left in the end is driven."""
    measured = measure(make_app())
    together = threading.Barrier(4, timeout=30)

    async def asks() -> None:
        together.wait()
        assert len(await ask(measured.app, 25)) == 25

    threads = [threading.Thread(target=run, args=(asks(),)) for run in (asyncio.run, uvloop.run) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert measured.value(REQUESTS, **OK) == 100
    assert asyncio.run(ask(measured.app)) == [True]
    assert not in_flight


def test_requests_go_on_while_the_app_is_given_up_and_taken_again(measure: Callable[..., Measured]) -> None:
    """Between requests of one loop an app can be left alone and measured again: only the others are counted."""
    measured = measure(app := make_app())

    async def turns() -> list[bool]:
        told = []
        for _ in range(3):
            told += await ask(app)
            measured.probe.uninstrument(app)
            told += await ask(app)
            measured.probe.instrument(app)
        return told

    assert asyncio.run(turns()) == [True, False] * 3
    assert measured.value(REQUESTS, **OK) == 3


def test_a_probe_that_is_bound_anew_counts_there(measure: Callable[..., Measured]) -> None:
    """A request that has just looked where to count does not have the next ones count where nobody reads any more."""
    anew: list[Writer] = []

    class Rebinding(FastAPI):
        @property
        def routes(self) -> Any:
            if anew:  # as another thread may at that moment
                measured.probe.bind(anew.pop())
            return super().routes

    app = Rebinding()
    measured = measure(app)

    @app.get("/task")
    async def task() -> bool:
        return True

    measured.probe._first_serve("http")
    anew.append(after := Writer.in_memory())
    asyncio.run(ask(app, 3))
    assert not anew
    assert measured.value(REQUESTS, **OK) == 1
    assert after.value(REQUESTS, **OK) == 2
