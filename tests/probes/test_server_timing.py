"""``Server-Timing`` on demand: who gets it, and what it says."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import StaticPool, create_engine, text

from fastapi_headroom import ledger
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.exchange import Exchange
from fastapi_headroom.probes.server_timing import TimedExchange, exchange_class
from fastapi_headroom.settings import load
from fastapi_headroom.wiring import init
from tests.support.measured import Measured, busy, uvicorn_serving

SECRET = "correct-horse-battery"
ASKED = {"X-Headroom-Timing": SECRET}


def stages(value: str) -> dict[str, float]:
    """Return the milliseconds by stage of a header."""
    return {name: float(number) for name, number in re.findall(r"([a-z_]+);dur=([0-9.]+)", value)}


def make_app() -> FastAPI:
    """Make an app that computes for 20 ms, and waits 30 ms for what it says is the database."""
    app = FastAPI()

    @app.get("/work")
    async def work(response: Response) -> str:
        request = ledger.current.get()
        assert request is not None
        busy(0.02)
        request.enter(ledger.DB)
        await asyncio.sleep(0.03)
        request.leave(ledger.DB)
        request.queries += 3
        request.cache_calls += 1
        response.headers["Server-Timing"] = "render;dur=7"
        return "ok"

    @app.websocket("/ws")
    async def ws(websocket: Any) -> None:
        await websocket.accept()
        await websocket.close()

    return app


def test_the_header_says_where_the_time_went(measure: Callable[..., Measured]) -> None:
    """Stages in milliseconds with the number of queries and cache calls, beside the app's own header, by uvicorn."""
    app = make_app()
    measure(app, server_timing="always")
    with uvicorn_serving(app) as port:
        headers = httpx.get(f"http://127.0.0.1:{port}/work").headers
    values = headers.get_list("server-timing")
    assert values[0] == "render;dur=7"
    assert len(values) == 2
    found = stages(values[1])
    assert 20 <= found["on_loop"] < 500
    assert 28 <= found["db"] < 500
    assert re.search(r'db;dur=[0-9.]+;desc="3 queries"', values[1])
    assert 'cache;dur=0.00;desc="1 call"' in values[1]
    assert sum(found.values()) - found["total"] == pytest.approx(found["total"], abs=0.1)
    assert "pool_wait" not in found  # stages without time are left out


async def test_nobody_gets_it_unless_asked(measure: Callable[..., Measured]) -> None:
    """By default nothing is added, and the class that adds it does not even serve."""
    measured = measure(make_app())
    async with measured.client() as client:
        response = await client.get("/work", headers=ASKED)
    assert response.headers.get_list("server-timing") == ["render;dur=7"]
    assert exchange_class(load({})) is Exchange
    assert exchange_class(load({"HEADROOM_SERVER_TIMING": "always"})) is TimedExchange


async def test_only_those_who_know_the_secret_get_it(measure: Callable[..., Measured]) -> None:
    """With a secret the header comes to requests that show it, byte for byte, and to no others."""
    measured = measure(make_app(), server_timing_secret=SECRET)
    wrong = ["", SECRET[:-1], SECRET + "x", SECRET.upper(), "x" * 10_000, f" {SECRET}, {SECRET}"]
    async with measured.client() as client:
        response = await client.get("/work", headers=ASKED)
        assert len(response.headers.get_list("server-timing")) == 2
        for shown in ({}, *({"X-Headroom-Timing": value} for value in wrong), {b"X-Headroom-Timing": b"\xff\xe9" * 9}):
            response = await client.get("/work", headers=shown)  # type: ignore[arg-type]
            assert response.headers.get_list("server-timing") == ["render;dur=7"], shown
    assert measured.nonzero("headroom_probe_errors_total") == {}


async def test_the_secret_is_compared_in_constant_time(
    measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a secret is right is left to hmac.compare_digest."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(shown: bytes, secret: bytes) -> bool:
        compared.append((shown, secret))
        return False

    monkeypatch.setattr("fastapi_headroom.probes.server_timing.hmac.compare_digest", compare)
    measured = measure(make_app(), server_timing_secret=SECRET)
    async with measured.client() as client:
        response = await client.get("/work", headers=ASKED)
    assert response.headers.get_list("server-timing") == ["render;dur=7"]
    assert compared == [(SECRET.encode(), SECRET.encode())]


async def test_two_apps_keep_their_secrets_apart(measure: Callable[..., Measured]) -> None:
    """The secret of one set of settings opens nothing under another."""
    first = measure(make_app(), server_timing_secret=SECRET)
    second = measure(make_app(), server_timing_secret=SECRET[::-1])
    async with first.client() as client:
        assert len((await client.get("/work", headers=ASKED)).headers.get_list("server-timing")) == 2
    async with second.client() as client:
        assert len((await client.get("/work", headers=ASKED)).headers.get_list("server-timing")) == 1


async def test_every_kind_of_response_can_carry_it(measure: Callable[..., Measured]) -> None:
    """Unknown paths, crashes, HEAD, streams and apps that hand over other iterables than lists get it, and nothing else
    of their headers changes."""
    app = FastAPI()

    async def pieces() -> AsyncIterator[str]:
        yield "a"
        yield "b"

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(pieces())

    @app.get("/boom")
    async def boom() -> None:
        raise ValueError

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        headers = None if scope["path"] == "/none" else ((name, b"1") for name in (b"x-a", b"x-b"))
        await send({"type": "http.response.start", "status": 200, **({} if headers is None else {"headers": headers})})
        await send({"type": "http.response.body", "body": b"ok"})

    app.mount("/plain", plain)
    measured = measure(app, server_timing="always")
    async with measured.client() as client:
        for method, path in (("GET", "/stream"), ("GET", "/boom"), ("GET", "/nothing"), ("HEAD", "/stream")):
            response = await client.request(method, path)
            assert "total;dur=" in response.headers["server-timing"], path
        response = await client.get("/plain/generator")
        assert (response.headers["x-a"], response.headers["x-b"]) == ("1", "1")
        assert "total;dur=" in response.headers["server-timing"]
    raw = measure(plain, server_timing="always")
    async with raw.client() as client:
        assert "total;dur=" in (await client.get("/none")).headers["server-timing"]
    assert measured.nonzero("headroom_probe_errors_total") == raw.nonzero("headroom_probe_errors_total") == {}


async def test_a_failure_in_it_leaves_the_response_as_it_was(
    measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while the header is made is counted as the probe's, and the app's response goes out."""

    def broken(_: Any) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("fastapi_headroom.probes.server_timing.describe", broken)
    measured = measure(make_app(), server_timing="always")
    response = await measured.get("/work")
    assert response.json() == "ok"
    assert response.headers.get_list("server-timing") == ["render;dur=7"]
    assert measured.value("headroom_probe_errors_total", probe="request") == 1


def test_the_queries_of_a_real_engine_are_told() -> None:
    """With every probe on, two statements of SQLAlchemy's in a sync endpoint show as time and number."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    app = FastAPI()

    @app.get("/")
    def handler() -> int:
        with engine.connect() as connection:
            connection.execute(text("select 1"))
            return int(connection.execute(text("select 2")).scalar_one())

    handle = init(app, exporter=False, server_timing="always")
    try:
        with TestClient(app) as client:
            value = client.get("/").headers["server-timing"]
    finally:
        handle.shutdown()
        engine.dispose()
    assert re.search(r'db;dur=[0-9.]+;desc="2 queries"', value), value
    assert stages(value)["db"] > 0


@pytest.mark.parametrize("value", ["on", "true", "", "ALWAYS", 1, None, ["always"]])
def test_a_mode_that_there_is_not_is_refused(value: Any) -> None:
    """The message names the two modes, and what to set to ask for single requests."""
    with pytest.raises(SettingsError, match=r"always or never; .* HEADROOM_SERVER_TIMING_SECRET"):
        load({}, server_timing=value)


@pytest.mark.parametrize("value", ["short", "with spaces in it, though long", "sécrèt-" * 5, "tab\tand\nnewline" * 3])
def test_a_secret_that_is_weak_or_cannot_be_sent_is_refused(value: str, caplog: pytest.LogCaptureFixture) -> None:
    """The message says what a secret looks like and does not show the one that was given; nor do the settings."""
    with pytest.raises(SettingsError, match="16 visible ASCII characters") as caught:
        load({}, server_timing_secret=value)
    assert value not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="fastapi_headroom"):
        settings = load({"HEADROOM_SERVER_TIMING_SECRET": value})
    assert exchange_class(settings) is Exchange
    assert "HEADROOM_SERVER_TIMING_SECRET='***' is ignored" in caplog.text
    assert value not in caplog.text
    assert SECRET not in repr(load({}, server_timing_secret=SECRET))
