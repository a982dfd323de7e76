"""Test suites that forbid blocking calls on the loop's thread: the app serves, and is measured all the same."""

from __future__ import annotations

import asyncio
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import fastapi_headroom as headroom
from fastapi_headroom.own_io import own_io


def forbid(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Make a blocking call an error on the thread of a running loop, as blockbuster does."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return original(*args, **kwargs)
        raise RuntimeError(f"blocking call to {name}")

    monkeypatch.setattr(owner, name, call)


def test_the_first_start_is_made_where_blocking_calls_are_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request is served and counted, every probe is up, and nothing is logged as an error."""
    app = FastAPI()

    @app.get("/x")
    async def handler() -> str:
        with pytest.raises(RuntimeError):
            os.stat(tmp_path)  # noqa: PTH116 - it is forbidden
        return "ok"

    handle = headroom.init(app, directory=tmp_path / "store", port=0)
    try:
        with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
            for name in ("mkdir", "stat", "rename", "replace", "unlink", "remove", "listdir", "readlink", "access"):
                forbid(patch, os, name)
            forbid(patch, Path, "read_text")
            forbid(patch, io, "open")
            with TestClient(app) as client:
                assert [client.get("/x").status_code for _ in range(3)] == [200, 200, 200]
            assert TestClient(app).get("/x").status_code == 200  # on another loop
        assert handle.writer is not None
        assert not handle.writer.degraded
        samples = handle.writer.samples()
        assert handle.writer.value("headroom_requests_total", http_route="/x", outcome="ok") == 4
        up = {dict(labels)["probe"]: value for (name, labels), value in samples.items() if name == "headroom_probe_up"}
        down = {probe for probe, value in up.items() if value != 1.0}
        assert down == set() != up.keys(), [record.getMessage() for record in caplog.records]
        assert [r.message for r in caplog.records if r.name == "fastapi_headroom" and r.levelno >= logging.ERROR] == []
    finally:
        handle.shutdown()


async def test_the_loop_is_back_afterwards() -> None:
    """Whatever is raised inside, nested or not, the loop runs as before."""
    loop = asyncio.get_running_loop()
    with pytest.raises(KeyError), own_io():
        with own_io(), pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        raise KeyError
    assert asyncio.get_running_loop() is loop
    await asyncio.sleep(0)
