"""The helpers that are shipped for users' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import fastapi_headroom as headroom
from fastapi_headroom.testing import capture_metrics


def make_app() -> FastAPI:
    app = FastAPI()

    @app.get("/orders/{order_id}")
    async def order(order_id: int) -> int:
        return order_id

    return app


def test_an_app_that_first_serves_inside_the_block_is_captured_without_files(tmp_path: Path) -> None:
    """capture_metrics() collects in memory: no directory is made, and the next block starts at 0."""
    app = make_app()
    handle = headroom.init(app, directory=tmp_path / "store")
    try:
        for _ in range(2):
            with capture_metrics() as metrics, TestClient(app) as client:
                client.get("/orders/7")
                labels = {"http_route": "/orders/{order_id}", "outcome": "ok"}
                assert metrics.value("headroom_requests_total", **labels) == 1
        assert not (tmp_path / "store").exists()
    finally:
        handle.shutdown()


def test_an_app_that_served_before_is_captured_and_returns_to_its_store(tmp_path: Path) -> None:
    """What is served inside the block is in the block alone; before and after it goes to the store."""
    app = make_app()
    handle = headroom.init(app, directory=tmp_path / "store", exporter=False)
    labels = {"http_route": "/orders/{order_id}", "outcome": "ok"}
    try:
        client = TestClient(app)
        client.get("/orders/1")
        store = handle.writer
        assert store is not None
        with capture_metrics() as metrics:
            client.get("/orders/2")
            client.get("/orders/3")
            assert metrics.value("headroom_requests_total", **labels) == 2
        client.get("/orders/4")
        assert store.value("headroom_requests_total", **labels) == 2
    finally:
        handle.shutdown()


def test_a_value_that_is_not_there_says_what_is(tmp_path: Path) -> None:
    """The KeyError names the samples of that name when a label lacks, and names that are alike when none has it."""
    app = make_app()
    handle = headroom.init(app, directory=tmp_path)
    try:
        with capture_metrics() as metrics, TestClient(app) as client:
            client.get("/orders/7")
            with pytest.raises(KeyError, match=r"wants all labels.*http_route='/orders/\{order_id\}'.*outcome='ok'"):
                metrics.value("headroom_requests_total", outcome="ok")
            with pytest.raises(KeyError, match="did you mean headroom_requests_total"):
                metrics.value("headroom_request_total", outcome="ok")
            with pytest.raises(KeyError, match="nothing of that name was measured"):
                metrics.value("shop_sold_total")
    finally:
        handle.shutdown()


def test_a_block_inside_another_is_refused(tmp_path: Path) -> None:
    """A second block would end the first one's capture unseen; it raises, and the first one goes on."""
    app = make_app()
    handle = headroom.init(app, directory=tmp_path / "store")
    try:
        with capture_metrics() as metrics:
            with pytest.raises(RuntimeError, match="blocks do not nest"), capture_metrics():
                pass
            TestClient(app).get("/orders/7")
            labels = {"http_route": "/orders/{order_id}", "outcome": "ok"}
            assert metrics.value("headroom_requests_total", **labels) == 1
    finally:
        handle.shutdown()
