"""Bad input: one clear line that names the remedy, and the app goes on serving."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

import fastapi_headroom as headroom
from demo_app.stack.process import wait_until
from fastapi_headroom.errors import NotASGIError, SettingsError
from tests.support.serving import ROOT, serve

APP = "tests.support.app:app"


def test_an_unknown_argument_names_the_nearest_setting() -> None:
    """A misspelt argument of init() is a programming error and says what was meant."""
    with pytest.raises(SettingsError, match="did you mean block_threshold"):
        headroom.init(FastAPI(), block_treshold=0.2)


def test_an_unusable_argument_says_why() -> None:
    """A value that cannot be used names the setting, the value and the reason."""
    with pytest.raises(SettingsError, match="'pol' is no probe; the probes are request, pool"):
        headroom.init(FastAPI(), disable="pol")


def test_what_is_no_asgi_app_is_refused() -> None:
    """init() of something that cannot be called says what it got."""
    with pytest.raises(NotASGIError, match="got dict"):
        headroom.init({})


def test_a_second_init_returns_the_first_handle() -> None:
    """init() is idempotent for one app."""
    app = FastAPI()
    handle = headroom.init(app, exporter=False)
    try:
        assert headroom.init(app) is handle
    finally:
        handle.shutdown()
        handle.shutdown()


def test_a_wrong_variable_is_named_and_the_app_serves() -> None:
    """An unknown and an unusable variable are logged in one line each, and defaults stand in."""
    with serve("uvicorn", APP, env={"HEADROOM_PROT": "1", "HEADROOM_SAMPLE_INTERVAL": "soon"}) as server:
        assert "pid" in server.get("/ping")
        log = server.log()
    assert "HEADROOM_PROT is ignored; did you mean HEADROOM_PORT?" in log
    assert "HEADROOM_SAMPLE_INTERVAL='soon' is ignored" in log
    assert "Traceback" not in log


def test_a_directory_that_cannot_be_made_leaves_the_app_serving(tmp_path: Path) -> None:
    """Where the store's directory cannot be, the app serves and one line names the directory and the remedy."""
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    with serve("uvicorn", APP, env={"HEADROOM_DIRECTORY": str(blocker / "store")}) as server:
        assert "pid" in server.get("/ping")
        assert "pid" in server.get("/ping")
        log = server.log()
    assert log.count("HEADROOM_DIRECTORY") == 1, log
    assert "Traceback" not in log


def test_a_taken_port_leaves_the_app_serving() -> None:
    """Where the exporter's port is taken, the app serves and one line names the port and the setting."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve("uvicorn", APP, env={"HEADROOM_PORT": str(port)}) as server:
            assert "pid" in server.get("/ping")
            wait_until(lambda: str(port) in server.log(), 60, "the warning")
            log = server.log()
    assert "HEADROOM_PORT" in log
    assert "Traceback" not in log


def test_missing_libraries_leave_the_app_serving() -> None:
    """Without SQLAlchemy, Redis, Celery and OpenTelemetry's SDK, init() works and the other probes measure."""
    program = """
import sys
class Missing:
    names = ("sqlalchemy", "redis", "celery", "opentelemetry.sdk", "opentelemetry.instrumentation")
    def find_spec(self, name, *_):
        if name.startswith(self.names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import asyncio, httpx
from fastapi import FastAPI
import fastapi_headroom as headroom
app = FastAPI()
@app.get("/ping")
async def ping(): return {}
headroom.init(app, exporter=False)
async def main():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        assert (await client.get("/ping")).status_code == 200
asyncio.run(main())
print("served")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT / "instrumentation"), "HEADROOM_SERVICE_NAME": f"bare-{os.getpid()}"},
    )
    assert done.stdout.strip() == "served", done.stderr
    assert "Traceback" not in done.stderr
