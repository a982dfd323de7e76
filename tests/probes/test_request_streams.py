"""Streams that answer late, fail on the way, or are merely slow downloads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from tests.support.measured import DURATION, Measured, eventually, uvicorn_serving

FIRST_BYTE = "headroom_request_time_to_first_byte_seconds"
LIFETIMES = "headroom_stream_lifetime_seconds_count"


def test_the_first_byte_is_told_from_the_last(measure: Callable[..., Measured]) -> None:
    """A response that starts after 100 ms and takes 200 ms more has 100 ms to its first byte, and 300 ms in all."""
    app = FastAPI()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0.2)
        yield b"b"

    @app.get("/late")
    async def late() -> StreamingResponse:
        await asyncio.sleep(0.1)
        return StreamingResponse(pieces())

    measured = measure(app)
    with uvicorn_serving(app) as port:
        httpx.get(f"http://127.0.0.1:{port}/late")
        eventually(lambda: measured.seconds("/late"))
    first = measured.value(FIRST_BYTE + "_sum", http_route="/late")
    assert first >= 0.099
    assert measured.seconds("/late") - first >= 0.199


@pytest.mark.parametrize("seconds", [0.0, 1.05], ids=["short", "long"])
@pytest.mark.parametrize("media", ["application/x-ndjson", "text/event-stream"])
def test_a_stream_that_fails_on_the_way_is_an_error(
    measure: Callable[..., Measured], media: str, seconds: float
) -> None:
    """It counts as failed whatever its status was; only a short one that is no stream has a duration."""
    app = FastAPI()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(seconds)
        raise LookupError

    @app.get("/pieces")
    async def handler() -> StreamingResponse:
        return StreamingResponse(pieces(), media_type=media)

    measured = measure(app)
    with uvicorn_serving(app) as port:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{port}/pieces")
        eventually(lambda: measured.nonzero("headroom_requests_total") == {("/pieces", "error"): 1})
    kind = "sse" if media == "text/event-stream" else "stream" if seconds else ""
    assert measured.nonzero(LIFETIMES) == ({("/pieces", kind): 1} if kind else {})
    durations = {} if kind else {("LookupError", "GET", "200", "/pieces"): 1}
    assert measured.nonzero(DURATION + "_count") == durations
    assert measured.value(FIRST_BYTE + "_count", http_route="/pieces") == 1
    assert measured.nonzero("headroom_request_disconnects_total") == {}
    assert measured.nonzero("http_server_active_requests") == {}


async def test_a_slow_download_of_known_length_is_a_request(measure: Callable[..., Measured]) -> None:
    """With Content-Length the last byte is what the client waits for: it stays in the durations, however long."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"2")]})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(1.05)
        await send({"type": "http.response.body", "body": b"b"})

    measured = measure(app)
    await measured.get("/")
    assert list(measured.nonzero(DURATION + "_count").values()) == [1]
    assert measured.nonzero(LIFETIMES) == {}
