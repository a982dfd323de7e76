"""Steps of requests that held the loop while nobody could look: requests time their steps themselves."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from fastapi import APIRouter, FastAPI

from fastapi_headroom.driver import Driven
from fastapi_headroom.holds import steps_of
from fastapi_headroom.ledger import Ledger
from tests.probes.looks import Told, finish, watchdog
from tests.probes.loops import RUNS, Run, convoy, measured, verdicts
from tests.support.measured import Measured, compute

pytestmark = pytest.mark.alone

DOCUMENT = [{"a": [1, 2, 3, 4, 5, 6, 7, 8]}] * 100_000


def make_app() -> FastAPI:
    """An app whose endpoint computes in C, with the GIL kept, in a router under a prefix."""
    app, router = FastAPI(), APIRouter()

    @router.get("/{number}")
    async def report(number: int) -> int:
        return sum(len(json.dumps(DOCUMENT)) for _ in range(number))

    @router.post("/{number}")
    async def file(number: int) -> None:
        """Do nothing: another endpoint of the same template."""

    app.include_router(router, prefix="/reports")
    return app


def now_and_then(stopped: threading.Event) -> None:
    """Compute for 4 ms of 16: when somebody lets go of the GIL, this thread may be the next to have it."""
    while not stopped.wait(0.012):
        compute(0.004)


async def compute_for(seconds: float) -> None:
    compute(seconds)


@pytest.mark.parametrize("kept", [0.0, 0.2])
async def test_step_that_nobody_could_look_at_is_its_endpoints(kept: float) -> None:
    """Site and request are known though no look came, be it known or not that the GIL was kept from the watchdog."""
    told = Told()
    request = Ledger("GET", None, make_app())
    request.route = "/reports/{number}"
    with watchdog(told) as watching:
        await Driven(compute_for(0.2), request)
        watching._late = kept
        finish(watching)
    (block,) = told.blocks
    assert block.site.split(":")[-2] == "make_app.report"
    assert block.cause in ("python", "native")
    assert block.is_by(request)
    assert request in block.requests
    assert 0.15 < block.seconds - block.starved < 0.4


async def test_request_whose_endpoint_nobody_knows_is_blamed_by_name_alone() -> None:
    """The request of a block is known where no route of the user's served it: the site is unknown, and it is native."""
    told = Told()
    request = Ledger("GET", None, object())
    with watchdog(told) as watching:
        await Driven(compute_for(0.2), request)
        finish(watching)
    (block,) = told.blocks
    assert block.site == "unknown"
    assert block.is_by(request)


async def test_short_steps_of_requests_are_nobodys_block() -> None:
    """Steps of 30 ms each, one after the other, are no block of any request."""
    told = Told()
    request = Ledger("GET", None, make_app())
    request.route = "/reports/{number}"
    with watchdog(told) as watching:
        for _ in range(4):
            await Driven(compute_for(0.03), request)
            await asyncio.sleep(0)
        finish(watching)
    assert [block.cause for block in told.blocks] == ["starved"]
    assert not told.blocks[0].is_by(request)


async def test_few_steps_are_remembered() -> None:
    """The latest eight of 20 ms or more, and none that is shorter."""
    request = Ledger("GET")
    for _ in range(10):
        await Driven(compute_for(0.021), request)
    await Driven(compute_for(0.002), request)
    steps = steps_of(asyncio.get_running_loop())
    assert len(steps) == 8
    assert all(step.request is request and step.ended - step.began >= 0.02 for step in steps)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_calls_that_keep_the_gil_are_named_beside_busy_threads(run: Run) -> None:
    """Whoever gets the GIL first when such a call returns, its seconds go to the code of the request."""

    async def main() -> dict[tuple[str, str], float]:
        app = Measured(make_app())
        try:
            async with measured() as (writer, _), app.client() as client:
                for _ in range(12):
                    await asyncio.sleep(0.1)
                    await client.get("/reports/4")
                await asyncio.sleep(0.3)
                return verdicts(writer)
        finally:
            app.probe.close()

    with convoy(2, now_and_then):
        found = run(main())
    computing = {site: seconds for (site, cause), seconds in found.items() if cause in ("native", "python")}
    named = sum(seconds for site, seconds in computing.items() if "make_app.report" in site)
    assert named > 0.5, found
    assert named >= 0.95 * sum(computing.values()), found
