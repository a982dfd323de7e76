"""Sizes of bodies as they cross the wire, and bytes that compressing would have saved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fastapi_headroom.probes.compressible import accepts, compressible
from tests.support.measured import DURATION, Measured, eventually, uvicorn_serving

RECEIVED = "http_server_request_body_size_bytes_sum"
SENT = "http_server_response_body_size_bytes"
COMPRESSIBLE = "headroom_response_compressible_bytes_total"
GZIP = {"accept-encoding": "gzip"}


def sent(measured: Measured, method: str, route: str) -> tuple[float, float]:
    """Return how many responses a route has sent, and their bytes."""
    labels = {"http_request_method": method, "http_route": route}
    return measured.value(SENT + "_count", **labels), measured.value(SENT + "_sum", **labels)


def test_chunked_bodies_count_as_they_come(measure: Callable[..., Measured]) -> None:
    """Without Content-Length either way, under uvicorn, both sizes are the bytes of the bodies."""
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> StreamingResponse:
        pieces = [piece async for piece in request.stream()]

        async def back() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return StreamingResponse(back())

    measured = measure(app)
    with uvicorn_serving(app) as port:
        chunks = (b"x" * 700 for _ in range(5))
        response = httpx.post(f"http://127.0.0.1:{port}/echo", content=chunks)
        assert "content-length" not in response.headers
        eventually(lambda: sent(measured, "POST", "/echo") == (1, 3500))
    assert measured.value(RECEIVED, http_request_method="POST", http_route="/echo") == 3500


def test_responses_without_a_body_have_size_0(measure: Callable[..., Measured], tmp_path: Path) -> None:
    """A HEAD, a 204 and a 304 send nothing, whatever body the app hands over; each is a response all the same."""
    (tmp_path / "file").write_bytes(b"x" * 5000)

    async def text(request: Request) -> Response:
        return PlainTextResponse("x" * 5000)

    async def file(request: Request) -> Response:
        return FileResponse(tmp_path / "file")

    async def status(request: Request) -> Response:
        return Response(status_code=int(request.path_params["code"]))

    app = Starlette(routes=[Route("/text", text), Route("/file", file), Route("/status/{code}", status)])
    measured = measure(app)
    with uvicorn_serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=GZIP) as client:
        assert client.head("/text").headers["content-length"] == "5000"
        client.head("/file")
        client.get("/status/204")
        client.get("/status/304")
        eventually(lambda: sent(measured, "GET", "/status/{code}") == (2, 0))
    assert sent(measured, "HEAD", "/text") == (1, 0)
    assert sent(measured, "HEAD", "/file") == (1, 0)
    assert measured.nonzero(COMPRESSIBLE) == {}
    statuses = {(labels[1], labels[2]) for labels in measured.nonzero(DURATION + "_count")}
    assert statuses == {("HEAD", "200"), ("GET", "204"), ("GET", "304")}


def test_files_and_ranges_count_what_is_sent(measure: Callable[..., Measured], tmp_path: Path) -> None:
    """A file of several chunks counts whole; a range and several ranges count their part; none is an error."""
    (tmp_path / "file.bin").write_bytes(b"x" * 200_000)
    app = FastAPI()

    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(tmp_path / "file.bin")

    measured = measure(app)
    with uvicorn_serving(app) as port:
        sizes: list[int] = []
        for ranges, status in ((None, 200), ("bytes=0-999", 206), ("bytes=0-9,100-199", 206), ("bytes=900000-", 416)):
            response = httpx.get(f"http://127.0.0.1:{port}/file", headers={"range": ranges} if ranges else {})
            assert response.status_code == status
            sizes.append(len(response.content))
            eventually(lambda: sent(measured, "GET", "/file") == (len(sizes), sum(sizes)))
    assert measured.nonzero("headroom_requests_total") == {("/file", "ok"): 3, ("/file", "client_error"): 1}


async def call(app: Any, scope: dict[str, Any], fails: type[Exception] | None = None) -> list[dict[str, Any]]:
    """Call an app as a server with extensions would; return what it sent."""
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if fails is not None and message["type"] not in ("http.response.start", "http.response.body"):
            raise fails()
        messages.append(message)

    base = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    await app({**base, **scope}, receive, send)
    return messages


async def test_files_that_the_server_sends_itself_count(measure: Callable[..., Measured], tmp_path: Path) -> None:
    """Under a server with the pathsend extension a FileResponse counts by its Content-Length, and is complete."""
    (tmp_path / "file.bin").write_bytes(b"x" * 70_000)
    app = FastAPI()

    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(tmp_path / "file.bin")

    measured = measure(app)
    scope = {"path": "/file", "extensions": {"http.response.pathsend": {}}}
    messages = await call(app, scope)
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.pathsend"]
    assert sent(measured, "GET", "/file") == (1, 70_000)
    with pytest.raises(OSError):
        await call(app, scope, fails=BrokenPipeError)
    assert measured.value("headroom_request_disconnects_total", http_route="/file") == 1
    assert measured.nonzero("headroom_requests_total") == {("/file", "ok"): 2}  # counted before the last byte left


async def test_zero_copy_sends_are_part_of_the_body(measure: Callable[..., Measured]) -> None:
    """The zerocopysend extension's messages count their bytes, and the last one ends the response."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"900")]})
        await send({"type": "http.response.zerocopysend", "file": 3, "count": 400, "more_body": True})
        await send({"type": "http.response.zerocopysend", "file": 3, "count": 500})

    measured = measure(app)
    await call(measured.app, {})
    assert sent(measured, "GET", "_unmatched") == (1, 900)
    assert measured.nonzero("headroom_requests_total") == {("_unmatched", "ok"): 1}


async def test_an_absurd_content_length_is_not_believed(measure: Callable[..., Measured]) -> None:
    """A client cannot spoil the sizes by announcing an exabyte, or thousands of digits, that nobody reads."""
    app = FastAPI()

    @app.post("/upload")
    async def upload() -> str:
        return "ok"

    measured = measure(app)
    for value in (b"9" * 19, b"9" * 5000, b"-1", b"1e9", b"\xb2", b""):
        await call(app, {"path": "/upload", "method": "POST", "headers": [(b"content-length", value)]})
    assert measured.nonzero(RECEIVED) == {}
    assert measured.nonzero("headroom_probe_errors_total") == {}
    assert measured.value("headroom_requests_total", http_route="/upload", outcome="ok") == 6


@pytest.mark.parametrize("compresses", [False, True], ids=["plain", "gzip"])
async def test_text_that_could_have_been_compressed_is_counted(
    measure: Callable[..., Measured], compresses: bool
) -> None:
    """Large JSON to a client that takes what the app does not send counts; small, binary or unasked for does not."""
    app = FastAPI()

    @app.get("/json/{size}")
    async def json(size: int) -> str:
        return "x" * (size - 2)

    @app.get("/image")
    async def image() -> Response:
        return Response(b"x" * 5000, media_type="image/png")

    if compresses:
        app.add_middleware(GZipMiddleware)
    measured = measure(app)
    async with measured.client() as client:
        await client.get("/json/5000", headers=GZIP)
        await client.get("/json/6000", headers={"accept-encoding": "br"})
        await client.get("/json/7000", headers={"accept-encoding": "identity"})
        await client.get("/json/1000", headers=GZIP)
        await client.get("/image", headers=GZIP)
    assert measured.nonzero(COMPRESSIBLE) == {("/json/{size}",): 6000 if compresses else 11_000}


def test_streams_count_as_compressible_and_events_do_not(measure: Callable[..., Measured]) -> None:
    """A body in pieces counts its bytes under uvicorn; server-sent events are not for compressing."""
    app = FastAPI()

    async def pieces() -> AsyncIterator[str]:
        for _ in range(4):
            yield "x" * 1000
            await asyncio.sleep(0)

    @app.get("/{kind}")
    async def stream(kind: str) -> StreamingResponse:
        return StreamingResponse(pieces(), media_type=f"text/{kind}")

    measured = measure(app)
    with uvicorn_serving(app) as port:
        for kind in ("event-stream", "csv"):
            httpx.get(f"http://127.0.0.1:{port}/{kind}", headers=GZIP)
        eventually(lambda: measured.nonzero(COMPRESSIBLE) == {("/{kind}",): 4000})


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ([b"gzip, deflate, br, zstd"], True),
        ([b"identity", b"GZip ; q=0.5"], True),
        ([b"*"], True),
        ([b"gzip;q=0, br;q=0.000"], False),
        ([b"gzip; q = 0"], False),
        ([b"identity"], False),
        ([b""], False),
        ([b"\xff\xfe,,,;;;q=,=,\x00"], False),
        ([b"," * 60_000 + b"gzip"], False),
        ([], False),
    ],
)
def test_accept_encoding_is_read_with_weights_and_repetitions(values: list[bytes], taken: bool) -> None:
    """A coding with weight 0 is refused, repeated headers add up, and rubbish of any length is no coding."""
    assert accepts([(b"host", b"a"), *((b"Accept-Encoding", value) for value in values)]) is taken


@pytest.mark.parametrize(
    ("media", "extra", "could"),
    [
        (b"text/html; charset=utf-8", [], True),
        (b"application/problem+json", [], True),
        (b"Image/SVG+XML", [], True),
        (b"text/plain", [(b"Content-Encoding", b"br")], False),
        (b"text/plain", [(b"content-encoding", b"identity")], True),
        (b"text/plain", [(b"content-range", b"bytes 0-1999/5000")], False),
        (b"text/event-stream", [], False),
        (b"application/octet-stream", [], False),
        (b"\xff\xff", [], False),
    ],
)
def test_what_can_be_compressed_is_text(media: bytes, extra: list[tuple[bytes, bytes]], could: bool) -> None:
    """Text types can be compressed, unless they are encoded already, are a part of a file, or are events."""
    request = [(b"accept-encoding", b"gzip")]
    assert compressible(request, [(b"content-type", media), *extra]) is could
    assert not compressible(request, extra)
