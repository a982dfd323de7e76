"""A test suite makes thousands of apps in one process: what is done for one takes the same time for all of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider

import fastapi_headroom as headroom
from fastapi_headroom import settings, wiring
from fastapi_headroom.testing import CapturedMetrics, capture_metrics
from fastapi_headroom.tracing.setup import Tracing


@pytest.fixture
def metrics() -> Iterator[CapturedMetrics]:
    """Measure without files."""
    with capture_metrics() as captured:
        yield captured


class Watched(FastAPI):
    """Counts how often somebody looks at its routes."""

    looks = 0

    @property
    def routes(self) -> Any:
        self.looks += 1
        return super().routes


def served(path: str) -> Watched:
    """Return an app whose route came after init, and that has served a request."""
    app = Watched()
    headroom.init(app, exporter=False) if wiring._runtime is None else headroom.init(app)

    @app.get(path)
    async def handler() -> str:
        return "ok"

    with TestClient(app) as client:
        assert client.get(path).status_code == 200
    return app


def test_an_app_costs_nothing_when_others_come(metrics: CapturedMetrics) -> None:
    """Apps that are initialised and serve after the first do not make anybody look at the first one's routes again."""
    apps = [served("/first")]
    try:
        before = apps[0].looks
        apps += [served(f"/r{number}") for number in range(20)]
        assert apps[0].looks == before > 0
        assert len({app.looks for app in apps[1:]}) == 1
        assert metrics.value("headroom_requests_total", http_route="/r19", outcome="ok") == 1
        assert metrics.value("headroom_requests_total", http_route="/r19", outcome="error") == 0
    finally:
        for app in apps:
            headroom.init(app).shutdown()


def test_a_dropped_app_is_forgotten_and_the_last_shutdown_puts_all_back(metrics: CapturedMetrics) -> None:
    """Nobody but its user keeps an app; a handle keeps it; shutdown of the last app that lives ends everything."""
    before = FastAPI.__call__
    kept = headroom.init(FastAPI(), exporter=False)
    dropped = weakref.ref(served("/x"))
    gc.collect()
    assert dropped() is None
    assert isinstance(kept.app, FastAPI)
    again = headroom.init(kept.app)
    assert again is kept
    assert FastAPI.__call__ is not before
    kept.shutdown()
    assert FastAPI.__call__ is before
    assert wiring._runtime is None


def test_a_handle_that_nobody_kept_is_made_again(metrics: CapturedMetrics) -> None:
    """Who did not keep the handle gets one by another init, and can stop by it; one that has stopped stays stopped."""
    app = FastAPI()
    headroom.init(app, exporter=False)
    first = headroom.init(app)
    first.shutdown()
    assert wiring._runtime is None
    second = headroom.init(app, exporter=False)
    first.shutdown()
    assert wiring._runtime is not None
    second.shutdown()
    assert wiring._runtime is None


def test_a_plain_callable_is_kept_until_shutdown(metrics: CapturedMetrics) -> None:
    """The handle of another ASGI callable is its only way to be measured, and stays the same one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    identity = id(headroom.init(app, exporter=False))
    gc.collect()
    handle = headroom.init(app)
    assert id(handle) == identity
    TestClient(handle).get("/")
    assert metrics.value("headroom_worker_requests_total", worker="0") == 1
    handle.shutdown()


def test_a_traced_app_that_is_dropped_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing an app does not keep it alive either, and stop() takes its instrumentation off those that live."""
    monkeypatch.setattr("fastapi_headroom.tracing.setup.configured_provider", TracerProvider)
    tracing, app, other = Tracing(settings.load({})), FastAPI(), FastAPI()
    assert tracing.start(app, other)
    dropped = weakref.ref(app)
    del app
    gc.collect()
    assert dropped() is None
    assert vars(other).get("build_middleware_stack") is not None
    tracing.stop()
    assert vars(other).get("build_middleware_stack") is None
