"""Clients that go away, at every point of a request, and apps that answer wrongly or not at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from tests.support.measured import DURATION, Measured, eventually, uvicorn_serving

GONE = "headroom_request_disconnects_total"
HALF = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"


def hang_up(port: int, request: bytes, when: Callable[[], Any] | None = None) -> None:
    """Send a request and close the connection, once a condition holds."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        if when is not None:
            eventually(when)


@pytest.mark.parametrize("middleware", [False, True], ids=["bare", "behind-middleware"])
def test_a_client_that_goes_before_its_body_was_read_is_no_error(
    measure: Callable[..., Measured], middleware: bool
) -> None:
    """Half an upload costs no error budget, whether the app reads the body itself, in pieces, or has it parsed."""
    app = FastAPI()
    begun: list[str] = []

    @app.post("/whole")
    async def whole(request: Request) -> None:
        begun.append("/whole")
        await request.body()

    @app.post("/pieces")
    async def pieces(request: Request) -> None:
        begun.append("/pieces")
        async for _ in request.stream():
            pass

    @app.post("/parsed")
    async def parsed(item: dict[str, int]) -> None:
        raise AssertionError("never called")

    if middleware:

        @app.middleware("http")
        async def passing(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    measured = measure(app)
    with uvicorn_serving(app) as port:
        for path in ("/whole", "/pieces"):
            hang_up(port, HALF % path.encode(), lambda path=path: path in begun)
        active = {"http_request_method": "POST"}
        hang_up(port, HALF % b"/parsed", lambda: measured.value("http_server_active_requests", **active) > 0)
        eventually(lambda: len(measured.nonzero(GONE)) == 3)
    assert measured.nonzero("headroom_requests_total") == {
        ("/whole", "client_error"): 1,
        ("/pieces", "client_error"): 1,
        ("/parsed", "client_error"): 1,
    }
    statuses = {labels[3]: labels[2] for labels in measured.nonzero(DURATION + "_count")}
    assert statuses["/whole"] == statuses["/pieces"] == "499"
    assert measured.value("http_server_active_requests", **active) == 0
    received = "http_server_request_body_size_bytes_sum"
    assert set(measured.nonzero(received).values()) == {1}  # what came, not what was announced


def test_a_client_that_goes_before_the_first_event_leaves_no_duration(measure: Callable[..., Measured]) -> None:
    """An event stream that had nothing to say until its client left is a stream, not a slow request."""
    app = FastAPI()
    begun: list[int] = []

    async def silent() -> AsyncIterator[str]:
        begun.append(1)
        await asyncio.sleep(60)
        yield "data: never\n\n"

    @app.get("/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(silent(), media_type="text/event-stream")

    measured = measure(app)
    with uvicorn_serving(app) as port:
        hang_up(port, b"GET /events HTTP/1.1\r\nhost: a\r\n\r\n", lambda: begun)
        eventually(lambda: measured.nonzero("headroom_stream_lifetime_seconds_count") == {("/events", "sse"): 1})
    assert measured.nonzero(DURATION + "_count") == {}
    assert measured.value("headroom_request_time_to_first_byte_seconds_count", http_route="/events") == 1
    assert measured.value(GONE, http_route="/events") == 1
    assert measured.nonzero("headroom_requests_total") == {("/events", "ok"): 1}


async def test_an_event_stream_without_events_is_still_a_stream(measure: Callable[..., Measured]) -> None:
    """One that ends after a while without having sent anything stays out of the durations too."""
    app = FastAPI()

    async def nothing() -> AsyncIterator[str]:
        await asyncio.sleep(1.05)
        for event in ():
            yield event

    @app.get("/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(nothing(), media_type="text/event-stream")

    measured = measure(app)
    await measured.get("/events")
    assert measured.nonzero("headroom_stream_lifetime_seconds_count") == {("/events", "sse"): 1}
    assert measured.nonzero(DURATION + "_count") == {}
    assert measured.value("headroom_request_time_to_first_byte_seconds_count", http_route="/events") == 1


@pytest.mark.parametrize("fails", [False, True], ids=["silent", "raises"])
def test_a_slow_request_without_a_response_is_no_stream(measure: Callable[..., Measured], fails: bool) -> None:
    """More than a second without a response, and then none or an exception, is a failed request with a duration."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(1.05)
        if fails:
            raise KeyError("x")

    measured = measure(app)
    with uvicorn_serving(measured.app) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 500
        error = "KeyError" if fails else "500"
        eventually(lambda: measured.nonzero(DURATION + "_count") == {(error, "GET", "500", "_unmatched"): 1})
    assert measured.nonzero("headroom_stream_lifetime_seconds_count") == {}


def test_an_app_that_goes_on_after_its_client_left_is_counted_once(measure: Callable[..., Measured]) -> None:
    """Asking again and again for the disconnect, and answering nevertheless, makes one request and one disconnect."""
    app = FastAPI()
    begun: list[int] = []

    @app.get("/stubborn")
    async def stubborn(request: Request) -> str:
        begun.append(1)
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        for _ in range(3):
            assert (await request.receive())["type"] == "http.disconnect"
        return "too late"

    @app.get("/broken")
    async def broken(request: Request) -> str:
        begun.append(2)
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        raise ValueError("a fault of the app's own")

    measured = measure(app)
    with uvicorn_serving(app) as port:
        hang_up(port, b"GET /stubborn HTTP/1.1\r\nhost: a\r\n\r\n", lambda: 1 in begun)
        hang_up(port, b"GET /broken HTTP/1.1\r\nhost: a\r\n\r\n", lambda: 2 in begun)
        eventually(lambda: measured.nonzero(GONE) == {("/stubborn",): 1, ("/broken",): 1})
    assert measured.nonzero("headroom_requests_total") == {("/stubborn", "ok"): 1, ("/broken", "error"): 1}
    errors = {labels[3]: labels[0] for labels in measured.nonzero(DURATION + "_count")}
    assert errors == {"/stubborn": "", "/broken": "ValueError"}


def test_a_second_start_of_a_response_is_one_failed_request(measure: Callable[..., Measured]) -> None:
    """What the server refuses (a second start, a body after the end) fails as it would unmeasured, counted once."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        if scope["path"] == "/twice":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        await send({"type": "http.response.body", "body": b"more"})

    measured = measure(app)
    with uvicorn_serving(measured.app) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/").text == "ok"
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{port}/twice")
        eventually(lambda: sum(measured.nonzero(DURATION + "_count").values()) == 2)
    assert measured.nonzero("headroom_requests_total") == {("_unmatched", "ok"): 1, ("_unmatched", "error"): 1}
    assert {labels[0] for labels in measured.nonzero(DURATION + "_count")} == {"", "RuntimeError"}
    assert measured.nonzero("headroom_probe_errors_total") == {}


async def test_exceptions_in_groups_count_by_the_one_inside(measure: Callable[..., Measured]) -> None:
    """A lone exception of a task group has its own type; several at once are a group; a raised SystemExit is seen."""
    app = FastAPI()

    @app.get("/{count}")
    async def boom(count: int) -> None:
        async def fail() -> None:
            raise LookupError

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(fail())

    measured = measure(app)
    await measured.get("/1")
    await measured.get("/2")
    assert {labels[0] for labels in measured.nonzero(DURATION + "_count")} == {"LookupError", "ExceptionGroup"}
