"""Where a request ends: streams, background tasks, sizes, disconnects, WebSockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, Request, Response, WebSocket
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.middleware.base import BaseHTTPMiddleware

from tests.support.measured import DURATION, Measured, busy, eventually, uvicorn_serving


async def test_background_tasks_do_not_count(measure: Callable[..., Measured]) -> None:
    """The duration ends with the last byte: 100 ms of background work add nothing, nor does its failure."""
    app = FastAPI()
    seen: list[float] = []

    async def afterwards() -> None:
        seen.append(measured.value("http_server_active_requests", http_request_method="GET"))
        seen.append(measured.seconds("/background"))
        seen.append(time.perf_counter() - began)
        busy(0.05)
        await asyncio.sleep(0.05)
        raise RuntimeError("too late to be the request's")

    @app.get("/background")
    async def handler(tasks: BackgroundTasks) -> str:
        tasks.add_task(afterwards)
        return "ok"

    measured = measure(app)
    began = time.perf_counter()
    await measured.get("/background")
    assert seen[0] == 0  # no longer in flight,
    assert 0 < seen[1] <= seen[2]  # and recorded, while the task still runs
    assert measured.seconds("/background") == seen[1]
    assert sum(measured.stages("/background").values()) == pytest.approx(seen[1], abs=0.001)
    assert measured.nonzero("headroom_requests_total") == {("/background", "ok"): 1}


def test_an_event_stream_is_kept_out_of_the_durations(measure: Callable[..., Measured]) -> None:
    """Server-sent events count by first byte, which is there while the stream is open, and by lifetime."""
    app = FastAPI()
    proceed = threading.Event()

    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        while not proceed.is_set():
            await asyncio.sleep(0.005)
        yield "data: 2\n\n"

    @app.get("/events")
    async def handler() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    measured = measure(app)
    first_byte = "headroom_request_time_to_first_byte_seconds_count"
    with uvicorn_serving(app) as port, httpx.stream("GET", f"http://127.0.0.1:{port}/events") as response:
        eventually(lambda: measured.value(first_byte, http_route="/events") == 1)
        assert measured.value("http_server_active_requests", http_request_method="GET") == 1
        proceed.set()
        assert response.read() == b"data: 1\n\ndata: 2\n\n"
        eventually(lambda: measured.nonzero("headroom_stream_lifetime_seconds_count") == {("/events", "sse"): 1})
    assert measured.value(first_byte, http_route="/events") == 1
    assert measured.nonzero(DURATION + "_count") == {}
    assert measured.nonzero("headroom_request_latency_seconds_count") == {}
    assert measured.stages("/events") == {}
    assert measured.value("headroom_requests_total", http_route="/events", outcome="ok") == 1
    assert measured.value("http_server_active_requests", http_request_method="GET") == 0


async def test_a_long_body_of_unknown_length_is_a_stream_and_a_short_one_is_not(
    measure: Callable[..., Measured],
) -> None:
    """Without Content-Length a body that stays open over a second is a stream; one in quick pieces is a response."""
    app = FastAPI()

    async def pieces(pause: float) -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(pause)
        yield "b"

    @app.get("/pieces/{pause}")
    async def handler(pause: float) -> StreamingResponse:
        return StreamingResponse(pieces(pause), media_type="application/x-ndjson")

    measured = measure(app)
    await measured.get("/pieces/0.01")
    assert len(measured.nonzero(DURATION + "_count")) == 1
    await measured.get("/pieces/1.1")
    assert sum(measured.nonzero(DURATION + "_count").values()) == 1
    assert measured.nonzero("headroom_stream_lifetime_seconds_count") == {("/pieces/{pause}", "stream"): 1}
    assert measured.value("headroom_request_time_to_first_byte_seconds_count", http_route="/pieces/{pause}") == 2


async def test_responses_that_come_in_pieces_are_ordinary(measure: Callable[..., Measured]) -> None:
    """What BaseHTTPMiddleware and gzip send in several messages stays in the duration histogram."""
    app = FastAPI()

    @app.get("/large")
    async def handler() -> Response:
        return Response(b"x" * 200_000, media_type="text/plain")

    app.add_middleware(GZipMiddleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    measured = measure(app)
    response = await measured.get("/large")
    assert len(response.content) == 200_000
    assert list(measured.nonzero(DURATION + "_count").values()) == [1]
    sent = measured.value("http_server_response_body_size_bytes_sum", http_route="/large", http_request_method="GET")
    assert 100 < sent < 10_000  # as sent: compressed


async def test_an_unread_body_counts_by_its_announced_length(measure: Callable[..., Measured]) -> None:
    """The size of an upload that the handler never read comes from Content-Length; a GET has no body size."""
    app = FastAPI()

    @app.api_route("/upload", methods=["GET", "PUT"])
    async def handler() -> str:
        return "ok"

    measured = measure(app)
    async with measured.client() as client:
        await client.put("/upload", content=b"x" * 4321)
        await client.get("/upload")
    assert measured.nonzero("http_server_request_body_size_bytes_sum") == {("PUT", "/upload"): 4321}


def test_a_client_that_goes_away_is_counted(measure: Callable[..., Measured]) -> None:
    """A client that hangs up in the middle of a stream, and one that never got an answer, are disconnects."""
    app = FastAPI()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0.01)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(endless(), media_type="text/event-stream")

    @app.get("/wait")
    async def wait(request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        raise asyncio.CancelledError

    measured = measure(app)
    with uvicorn_serving(app) as port:
        with httpx.stream("GET", f"http://127.0.0.1:{port}/stream") as response:
            next(response.iter_raw())
        eventually(lambda: measured.value("headroom_request_disconnects_total", http_route="/stream") == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"http://127.0.0.1:{port}/wait", timeout=0.2)
        eventually(lambda: measured.value("headroom_request_disconnects_total", http_route="/wait") == 1)
    outcomes = measured.nonzero("headroom_requests_total")
    assert outcomes == {("/stream", "ok"): 1, ("/wait", "client_error"): 1}
    assert measured.nonzero(DURATION + "_count").keys() == {("", "GET", "499", "/wait")}
    assert measured.value("http_server_active_requests", http_request_method="GET") == 0


def test_websockets_count_by_connection_and_message(measure: Callable[..., Measured]) -> None:
    """Open connections, messages each way and lifetimes, by route; no request duration."""
    app = FastAPI()

    @app.websocket("/rooms/{room}")
    async def room(websocket: WebSocket, room: str) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)
            await websocket.send_text(text)

    measured = measure(app)
    route = {"http_route": "/rooms/{room}"}
    with TestClient(app).websocket_connect("/rooms/1") as socket:
        for _ in range(3):
            socket.send_text("hello")
            socket.receive_text()
            socket.receive_text()
        assert measured.value("headroom_websocket_connections", **route) == 1
    eventually(lambda: measured.value("headroom_websocket_connections", **route) == 0)
    assert measured.value("headroom_websocket_messages_total", **route, direction="received") == 3
    assert measured.value("headroom_websocket_messages_total", **route, direction="sent") == 6
    assert measured.value("headroom_stream_lifetime_seconds_count", **route, kind="websocket") == 1
    assert measured.nonzero(DURATION + "_count") == {}
