"""The request probe: traffic, errors and labels, and FastAPI's own telemetry."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from opentelemetry.sdk.trace import TracerProvider

from tests.support.measured import DURATION, STAGE, Measured, eventually, uvicorn_serving


async def test_a_request_is_measured_in_every_family(measure: Callable[..., Measured]) -> None:
    """One request counts once in each family, by method, route and status."""
    app = FastAPI()

    @app.post("/items/{item}")
    async def item(item: int, request: Request) -> dict[str, int]:
        await request.body()
        return {"item": item}

    measured = measure(app)
    async with measured.client() as client:
        response = await client.post("/items/7", content=b"x" * 1500)
    assert response.json() == {"item": 7}
    route = {"http_route": "/items/{item}"}
    status = {"http_response_status_code": "200", "error_type": "", "http_request_method": "POST"}
    assert measured.value(DURATION + "_count", **route, **status) == 1
    assert 0 < measured.value(DURATION + "_sum", **route, **status) < 1
    assert measured.value("headroom_request_latency_seconds_count", **route) == 1
    assert measured.value("headroom_requests_total", **route, outcome="ok") == 1
    assert measured.value("headroom_worker_requests_total", worker="0") == 1
    assert measured.value("headroom_request_time_to_first_byte_seconds_count", **route) == 1
    assert measured.value("headroom_request_loop_hold_seconds_count", **route) == 1
    assert measured.value("headroom_request_queries_count", **route) == 1
    sizes = {**route, "http_request_method": "POST"}
    assert measured.value("http_server_request_body_size_bytes_sum", **sizes) == 1500
    assert measured.value("http_server_response_body_size_bytes_sum", **sizes) == len(response.content)
    assert measured.value("http_server_active_requests", http_request_method="POST") == 0


def test_an_exception_is_reported_by_its_type(measure: Callable[..., Measured]) -> None:
    """A handler that raises ValueError gives status 500, error_type ValueError and outcome error, under uvicorn."""
    app = FastAPI()

    @app.get("/boom")
    async def boom() -> None:
        raise ValueError("no")

    measured = measure(app)
    with uvicorn_serving(app) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/boom").status_code == 500
        labels = {"http_route": "/boom", "http_request_method": "GET", "http_response_status_code": "500"}
        eventually(lambda: measured.value(DURATION + "_count", **labels, error_type="ValueError") == 1)
    assert measured.value("headroom_requests_total", http_route="/boom", outcome="error") == 1
    assert measured.nonzero(DURATION + "_count").keys() == {("ValueError", "GET", "500", "/boom")}


async def test_statuses_become_outcomes(measure: Callable[..., Measured]) -> None:
    """A 404 is the client's error; a 503 that a handler chose is an error whose type is the status."""
    app = FastAPI()

    @app.get("/status/{code}")
    async def status(code: int) -> None:
        raise HTTPException(code)

    measured = measure(app)
    for code in (404, 503):
        await measured.get(f"/status/{code}")
    assert measured.nonzero("headroom_requests_total") == {
        ("/status/{code}", "client_error"): 1,
        ("/status/{code}", "error"): 1,
    }
    assert measured.nonzero(DURATION + "_count").keys() == {
        ("", "GET", "404", "/status/{code}"),
        ("503", "GET", "503", "/status/{code}"),
    }


async def test_series_are_there_before_the_first_request(measure: Callable[..., Measured]) -> None:
    """Every route has its three outcomes at 0 from the start; a route that is added later gets them as well."""
    app = FastAPI()

    @app.get("/first")
    async def first() -> str:
        return "ok"

    measured = measure(app)
    measured.probe.bind(measured.writer)
    for outcome in ("ok", "client_error", "error"):
        assert measured.writer.value("headroom_requests_total", http_route="/first", outcome=outcome) == 0

    app.add_api_route("/second", first)
    app.add_api_route("/third", first)
    await measured.get("/second")
    assert measured.value("headroom_requests_total", http_route="/second", outcome="ok") == 1
    assert measured.writer.value("headroom_requests_total", http_route="/second", outcome="error") == 0
    assert measured.writer.value("headroom_requests_total", http_route="/third", outcome="error") == 0


async def test_routes_that_nobody_calls_cost_little(measure: Callable[..., Measured]) -> None:
    """An app with 500 routes does not use up the budget of series before a request comes."""
    app = FastAPI()
    for number in range(500):
        app.add_api_route(f"/{number}/{{x}}", lambda x: x)
    measured = measure(app)
    measured.probe.bind(measured.writer)
    assert len(measured.writer.samples()) < 2000
    assert measured.value("headroom_label_overflow_total") == 0


async def test_random_paths_make_no_series(measure: Callable[..., Measured]) -> None:
    """A thousand unknown paths and methods share the series of the first."""
    app = FastAPI()

    @app.get("/items/{item}")
    async def item(item: str) -> str:
        return item

    measured = measure(app)

    def series() -> set[Any]:
        # Not the stages: a busy machine makes one that was not there, such as loop_blocked.
        return {sample for sample in measured.writer.samples() if sample[0] != STAGE}

    async with measured.client() as client:
        for path in ("/nothing", "/items/1"):
            await client.get(path)
            await client.request("BREW", path)
        before = series()
        for number in range(250):
            path = f"{random.getrandbits(64):x}/{number}"
            await client.get(f"/{path}")
            await client.get(f"/items/{number}")
            await client.request(f"X{number}", f"/{path}")
            await client.request(f"X{number}", f"/items/{number}")
    assert series() == before
    routes = {labels[0] for labels in measured.nonzero("headroom_requests_total")}
    assert routes == {"_unmatched", "/items/{item}"}
    methods = {labels[1] for labels in measured.nonzero(DURATION + "_count")}
    assert methods == {"GET", "_OTHER"}


async def test_error_types_are_capped(measure: Callable[..., Measured]) -> None:
    """Of 80 exception classes 50 are told apart, and the others share one value."""
    app = FastAPI()

    @app.get("/boom/{number}")
    async def boom(number: int) -> None:
        raise type(f"Made{number}Error", (Exception,), {})()

    measured = measure(app)
    async with measured.client() as client:
        for _ in range(2):
            for number in range(80):
                await client.get(f"/boom/{number}")
    errors = {labels[0]: value for labels, value in measured.nonzero(DURATION + "_count").items()}
    assert len(errors) == 51
    assert errors["_OTHER"] == 60
    assert sum(errors.values()) == 160


async def test_preflights_and_redirects_have_routes_of_their_own(measure: Callable[..., Measured]) -> None:
    """A CORS preflight and a trailing-slash redirect reach no route, and are told from unknown paths."""
    app = FastAPI()

    @app.get("/items")
    async def items() -> str:
        return "ok"

    app.add_middleware(CORSMiddleware, allow_origins=["http://a.test"])
    measured = measure(app)
    async with measured.client() as client:
        asked = {"Origin": "http://a.test", "Access-Control-Request-Method": "GET"}
        assert (await client.options("/items", headers=asked)).status_code == 200
        assert (await client.get("/items/")).status_code == 307
    assert {labels[0] for labels in measured.nonzero("headroom_requests_total")} == {"_preflight", "_redirect"}


@pytest.mark.skipif(not hasattr(FastAPI(), "_telemetry"), reason="this FastAPI has no telemetry of its own")
@pytest.mark.parametrize(
    ("telemetry", "keep", "dormant"),
    [
        (None, False, True),
        (None, True, False),
        ({"tracer_provider": TracerProvider()}, False, False),
        ({"metrics": False}, False, False),
    ],
    ids=["default", "kept-by-setting", "provider-of-the-user", "configured-by-the-user"],
)
async def test_dormant_telemetry_stands_aside(
    measure: Callable[..., Measured], telemetry: Any, keep: bool, dormant: bool
) -> None:
    """FastAPI's own telemetry is told to stand aside, unless the user configured or keeps it."""
    app = FastAPI(telemetry=telemetry)
    seen: list[bool] = []

    @app.get("/")
    async def handler(request: Request) -> None:
        seen.append(request.scope.get("fastapi.telemetry", "absent") is None)

    measured = measure(app, keep_fastapi_telemetry=keep)
    await measured.get("/")
    assert seen == [dormant]


@pytest.mark.skipif(not hasattr(FastAPI(), "_telemetry"), reason="this FastAPI has no telemetry of its own")
async def test_telemetry_that_reports_to_a_provider_is_left_on(
    measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a global provider FastAPI's spans stay on, until our own tracing has taken over."""
    provider = TracerProvider()
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    app = FastAPI()
    seen: list[bool] = []

    @app.get("/")
    async def handler(request: Request) -> None:
        seen.append("fastapi.telemetry" in request.scope and request.scope["fastapi.telemetry"] is None)

    measured = measure(app)
    await measured.get("/")
    measured.probe.owns_tracing = True
    measured.probe.sample()
    await measured.get("/")
    assert seen == [False, True]
