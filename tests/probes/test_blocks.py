"""What a block tells of the requests that it held up: in the log, and in traces."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import fastapi_headroom as headroom
from fastapi_headroom import ledger
from fastapi_headroom.testing import capture_metrics
from tests.probes.loops import BLOCKS, DELAY, RUNS, Run, measured, total, until
from tests.support.measured import Measured, best_of

pytestmark = pytest.mark.alone


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def make_app() -> FastAPI:
    app = FastAPI()

    @app.get("/wait")
    async def wait() -> None:
        await asyncio.sleep(0.3)

    @app.get("/block/{number}")
    async def block(number: int) -> None:
        time.sleep(0.4)  # noqa: ASYNC251

    return app


def test_log_record_tells_what_was_lost(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Three requests that wait and one that blocks for 400 ms are four in flight, which lost four times that."""

    async def main() -> float:
        """Return how long the request took that blocked."""
        app, over = make_app(), asyncio.Event()

        @app.get("/wait-for-it")
        async def wait_for_it() -> None:
            await over.wait()

        served = Measured(app)
        try:
            async with measured() as (writer, _), served.client() as client:
                waiting = [asyncio.create_task(client.get("/wait-for-it")) for _ in range(3)]
                await until(lambda: len(ledger.in_flight) == 3)
                began = time.monotonic()
                await client.get("/block/7")
                held = time.monotonic() - began
                over.set()
                await asyncio.gather(*waiting)
                await until(lambda: total(writer, BLOCKS) >= 1)
                assert not ledger.in_flight
        finally:
            served.probe.close()
        return held

    def told() -> tuple[float, float, str]:
        """Return what each of four was held up for, what they lost together, and the record that says it."""
        caplog.clear()
        held = run(main())
        (record,) = [record.getMessage() for record in caplog.records if "the event loop" in record.getMessage()]
        found = re.search(r"while serving /block/\{number\}; 4 requests in flight lost ([\d.]+) s together", record)
        return held, float(found[1]) if found else 0.0, record

    with caplog.at_level(logging.WARNING, "fastapi_headroom"):
        held, lost, record = best_of(told, lambda one: abs(one[1] - 4 * one[0]) <= 0.1)
    assert lost == pytest.approx(4 * held, abs=0.1), record


def test_failed_and_cancelled_requests_are_not_in_flight() -> None:
    """However a request ends, it is taken out of those in flight."""
    app = make_app()

    @app.get("/fail")
    async def fail() -> None:
        raise ValueError

    async def main() -> None:
        served = Measured(app)
        try:
            async with served.client() as client:
                assert (await client.get("/fail")).status_code == 500
                task = asyncio.create_task(client.get("/wait"))
                await until(lambda: len(ledger.in_flight) == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        finally:
            served.probe.close()

    asyncio.run(main())
    assert not ledger.in_flight


@pytest.fixture
def measured_app() -> Iterator[FastAPI]:
    app = make_app()
    handle = headroom.init(app)
    yield app
    handle.shutdown()


def beats(metrics: object) -> float:
    samples = metrics.samples()  # type: ignore[attr-defined]
    return float(samples.get((f"{DELAY}_count", (("worker", "0"),)), 0.0))


def test_each_loop_of_a_process_is_measured(measured_app: FastAPI) -> None:
    """Several clients, each with a loop of its own, with a lifespan or without: the loop that runs is measured."""
    with capture_metrics() as metrics:
        for _ in range(3):
            before = beats(metrics)
            with TestClient(measured_app) as client:
                client.get("/wait")
                assert beats(metrics) - before > 5
        for _ in range(3):
            before = beats(metrics)
            TestClient(measured_app).get("/wait")
            assert beats(metrics) - before > 5


def test_a_second_asyncio_run_is_measured(measured_app: FastAPI, run: Run) -> None:
    """A process that runs one loop after the other has the blocks of each."""

    async def main() -> None:
        transport = httpx.ASGITransport(measured_app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get("/wait")
            await client.get("/block/1")
            await asyncio.sleep(0.3)

    with capture_metrics() as metrics:
        for count in (1, 2, 3):
            run(main())
            deadline = time.monotonic() + 5
            while total(metrics.writer, BLOCKS) < count:
                assert time.monotonic() < deadline, "a block was missed"
                time.sleep(0.01)
