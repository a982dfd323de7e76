"""Which apps are measured, from when on, and how all is put back."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Route

from fastapi_headroom import settings
from fastapi_headroom.ledger import current
from fastapi_headroom.probes.exchange import Exchange
from fastapi_headroom.probes.request import RequestProbe
from tests.support.measured import DURATION, Measured


async def test_middleware_that_is_added_later_lies_inside(measure: Callable[..., Measured]) -> None:
    """A middleware added after init is part of what is measured."""
    app = FastAPI()

    @app.get("/")
    async def handler() -> str:
        return "ok"

    measured = measure(app)

    @app.middleware("http")
    async def slow(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        await asyncio.sleep(0.05)
        return await call_next(request)

    await measured.get("/")
    assert measured.seconds("/") >= 0.05


async def test_only_the_outermost_app_measures(measure: Callable[..., Measured]) -> None:
    """A mounted app that is measured itself does not count the requests of its parent again."""
    sub = FastAPI()

    @sub.get("/x")
    async def handler() -> str:
        return "ok"

    app = FastAPI()
    app.mount("/sub", sub)
    measured = measure(app)
    measured.probe.instrument(sub)
    await measured.get("/sub/x")
    assert measured.nonzero("headroom_requests_total") == {("/sub/x", "ok"): 1}


async def test_other_apps_are_left_alone_and_closing_puts_all_back() -> None:
    """An app without init is not measured; after close the classes are as before and the app still serves."""
    before = FastAPI.__call__, Starlette.__call__
    app, other = FastAPI(), Starlette(routes=[Route("/", lambda request: Response())])
    measured, starlette = Measured(app), Starlette()
    measured.probe.instrument(starlette)
    assert FastAPI.__call__ is not before[0]
    assert inspect.iscoroutinefunction(FastAPI.__call__)  # uvicorn asks
    assert inspect.iscoroutinefunction(Starlette.__call__)
    transport = httpx.ASGITransport(other)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/")).status_code == 200
    assert measured.served == []
    await measured.get("/")
    assert measured.value("headroom_worker_requests_total", worker="0") == 1
    measured.probe.close()
    measured.probe.close()
    assert (FastAPI.__call__, Starlette.__call__) == before
    assert (await measured.get("/")).status_code == 404
    assert measured.value("headroom_worker_requests_total", worker="0") == 1


async def test_another_asgi_callable_is_measured_through_the_wrapper(measure: Callable[..., Measured]) -> None:
    """A plain ASGI function is wrapped, counted, and a crash before any response is a 500 of that type."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/crash":
            raise KeyError("x")
        if scope["path"] == "/silent":
            return
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"ok", "more_body": scope["path"] == "/half"})

    measured = measure(app)
    assert measured.app is not app
    assert measured.probe.instrument(app) is measured.app
    assert (await measured.get("/")).text == "ok"
    for path in ("/crash", "/silent", "/half"):
        with pytest.raises((AssertionError, KeyError)):  # httpx's own words for an app that did not answer
            transport = httpx.ASGITransport(measured.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await client.get(path)
    assert measured.nonzero(DURATION + "_count") == {
        ("", "GET", "200", "_unmatched"): 1,
        ("KeyError", "GET", "500", "_unmatched"): 1,
        ("500", "GET", "500", "_unmatched"): 1,
        ("IncompleteResponse", "GET", "200", "_unmatched"): 1,
    }
    measured.probe.uninstrument(app)
    await measured.get("/")
    assert measured.value("headroom_requests_total", http_route="_unmatched", outcome="ok") == 1


async def test_excluded_paths_are_not_measured(measure: Callable[..., Measured]) -> None:
    """Paths of the setting are served and leave no trace, exact ones and prefixes."""
    app = FastAPI()
    for path in ("/healthz", "/internal/a", "/healthz2"):
        app.add_api_route(path, lambda: "ok")
    measured = measure(app, excluded_paths=("/healthz", "/internal/*"))
    for path in ("/healthz", "/internal/a", "/healthz2"):
        assert (await measured.get(path)).status_code == 200
    assert measured.nonzero("headroom_requests_total") == {("/healthz2", "ok"): 1}


def test_the_first_scope_of_a_process_starts_the_probes_once(measure: Callable[..., Measured]) -> None:
    """The lifespan and the first request start, later ones do not, and after rearm (a fork) the next one does."""
    measured = measure(FastAPI())
    assert measured.served == []
    with TestClient(measured.app) as client:
        assert measured.served == ["lifespan"]
        client.get("/")
        client.get("/")
        assert measured.served == ["lifespan", "http"]
        measured.probe.rearm()
        client.get("/")
        assert measured.served == ["lifespan", "http", "http"]
    assert measured.value("headroom_worker_requests_total", worker="0") == 3


async def test_a_start_that_fails_leaves_the_app_serving(caplog: pytest.LogCaptureFixture) -> None:
    """When the probes cannot be started the app serves unmeasured, and the log says it once."""

    def broken(kind: str) -> None:
        raise OSError("no directory")

    app = FastAPI()
    probe = RequestProbe(settings.load({}), on_first_serve=broken)
    probe.instrument(app)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            with caplog.at_level(logging.ERROR, logger="fastapi_headroom"):
                for _ in range(3):
                    assert (await client.get("/")).status_code == 404
    finally:
        probe.close()
    assert caplog.text.count("the request probe failed") == 1


async def test_a_failing_hook_never_reaches_the_app(
    measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the probe is counted and turns the probe's health to 0; the response is as it was."""

    def broken(self: Exchange, error_type: str) -> None:
        raise ZeroDivisionError

    app = FastAPI()
    measured = measure(app)
    monkeypatch.setattr(Exchange, "record", broken)
    assert (await measured.get("/")).status_code == 404
    assert measured.value("headroom_probe_errors_total", probe="request") == 1
    assert measured.writer.value("headroom_probe_up", probe="request") == 0


async def test_an_app_may_return_any_awaitable_and_value(measure: Callable[..., Measured]) -> None:
    """A callable that returns a future is awaited; its value reaches the server; None is refused in Python's words."""
    answers: list[Any] = []

    def app(scope: Any, receive: Any, send: Any) -> Any:
        answer = answers.pop()
        return None if answer is None else asyncio.ensure_future(asyncio.sleep(0.001, answer))

    measured = measure(app)
    answers[:] = [None, "value"]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    assert await measured.app(dict(scope), None, None) == "value"
    with pytest.raises(TypeError, match="await"):
        await measured.app(dict(scope), None, None)
    assert measured.value("headroom_worker_requests_total", worker="0") == 2


async def test_a_coroutine_function_may_return_a_value(measure: Callable[..., Measured]) -> None:
    """What a callable of another kind returns reaches the server, whether or not it waits for something first."""

    async def app(scope: Any, receive: Any, send: Any) -> str:
        if scope["path"] == "/waits":
            await asyncio.sleep(0)
        return "value"

    measured = measure(app)
    for path in ("/", "/waits"):
        assert await measured.app({"type": "http", "method": "GET", "path": path, "headers": []}, None, None) == "value"
    assert measured.value("headroom_worker_requests_total", worker="0") == 2


async def test_an_abandoned_request_is_closed_inside_out(measure: Callable[..., Measured]) -> None:
    """A server that throws a request's coroutine away runs the handler's clean-up; the request is counted, once."""
    app, log = FastAPI(), []

    async def resource() -> Any:
        try:
            yield
        except BaseException as error:
            log.append(f"dependency {type(error).__name__}")
            raise

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        manager = contextlib.asynccontextmanager(resource)()
        async with manager:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                log.append("handler")

    app.mount("/hold", asgi)
    measured = measure(app)
    scope = {"type": "http", "method": "GET", "path": "/hold/", "headers": [], "query_string": b""}
    coroutine = measured.app(scope, None, None)
    coroutine.send(None)
    coroutine.close()
    assert log == ["handler", "dependency GeneratorExit"]
    assert measured.value("headroom_worker_requests_total", worker="0") == 1
    assert current.get() is None
