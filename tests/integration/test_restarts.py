"""Workers that are killed, recycled, reloaded or forked: no answered request is lost, none is counted twice."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
import urllib.error
from pathlib import Path

import pytest

from demo_app.stack.process import wait_until
from fastapi_headroom.store.reader import Reader
from tests.support.serving import serve
from tests.support.survival import APP, children_of, counted, kill_workers_at_random

pytestmark = pytest.mark.alone

FILES = 5
"""Files that a worker of the app may have at most: counter, histogram, gauges by mode, and the lock."""


def slots(directory: Path) -> list[str]:
    """Return the names of the lock files of slots."""
    return sorted(path.name for path in directory.glob("slot*.lock"))


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_worker_killed_right_after_its_answer_has_counted_it(status: int) -> None:
    """A process that dies at the moment when the last byte was handed over has the request in its files."""
    with serve("uvicorn", APP, env={"SURVIVOR_DIES": "answered"}) as server:
        server.get("/ping")
        with contextlib.suppress(urllib.error.URLError, http.client.HTTPException, ConnectionError):
            server.get(f"/last?status={status}")
        wait_until(lambda: not server.process.running, 10, "the end of the server")
        assert counted(server.directory, "/last") == 1


def test_workers_killed_at_random_lose_no_answered_request() -> None:
    """Under load every answer that a client got is counted, and nothing that no client asked for."""
    with serve("gunicorn", APP, workers=3) as server:
        clients, kills = kill_workers_at_random(server, seconds=6, seed=7)
        assert kills >= 5
        assert clients.answered > 200
        assert clients.answered <= counted(server.directory) <= clients.asked
        taken = slots(server.directory)  # the lowest free ones, never more than workers: a busy machine starts fewer
        assert taken and taken == ["slot0.lock", "slot1.lock", "slot2.lock"][: len(taken)]
        assert set(clients.statuses) == {200}


def test_recycled_workers_leave_no_files() -> None:
    """gunicorn --max-requests replaces workers again and again: totals are exact, files are those of two workers."""
    options = ("--max-requests", "40", "--graceful-timeout", "5")
    with serve("gunicorn", APP, workers=2, options=options) as server:
        pids = {json.loads(server.get("/ping"))["pid"] for _ in range(10)}
        total, deadline = 10, time.monotonic() + 60  # how many requests fit into a replacement depends on the machine
        while len(pids) < 8:
            with contextlib.suppress(OSError, http.client.HTTPException):
                pids.add(json.loads(server.get("/ping"))["pid"])
                total += 1
            assert time.monotonic() < deadline, f"{len(pids)} processes answered {total} requests"
        # A replaced worker may overlap with its successor while it ends.
        assert counted(server.directory) == total
        assert len(slots(server.directory)) <= 4
        assert len(list(server.directory.glob("*.db"))) <= FILES * len(slots(server.directory))
        reader = Reader(server.directory)
        wait_until(lambda: len(reader.read().alive) == 2, 10, "two workers")
        assert reader.read().values()["headroom_worker_restarts_total", ()] >= 3
        reader.close()


def test_a_reloaded_app_goes_on_in_its_slot(tmp_path: Path) -> None:
    """uvicorn --reload starts a new process for each change; the counters go on, in one slot."""
    module = tmp_path / "reloaded_app.py"
    module.write_text("from tests.support.survivor import app\n")
    options = ("--reload", "--reload-dir", str(tmp_path), "--app-dir", str(tmp_path))
    with serve("uvicorn", "reloaded_app:app", options=options) as server:
        first = json.loads(server.get("/ping"))["pid"]
        pids, total, unanswered = {first}, 1, 0
        for change in range(2):
            module.write_text(module.read_text() + f"# change {change}\n")
            known, deadline = len(pids), time.monotonic() + 20
            while len(pids) == known and time.monotonic() < deadline:
                time.sleep(0.02)
                try:
                    pids.add(json.loads(server.get("/ping", timeout=10))["pid"])
                    total += 1
                except (OSError, http.client.HTTPException):
                    unanswered += 1  # served or not: nobody knows
            assert len(pids) == known + 1, server.log()
        assert total <= counted(server.directory) <= total + unanswered
        assert slots(server.directory) == ["slot0.lock"]


def test_a_fork_in_the_middle_takes_nothing_along() -> None:
    """A child forked by a serving worker neither counts nor holds the slot, and the worker counts on."""
    with serve("gunicorn", APP, workers=1) as server:
        for _ in range(20):
            server.get("/ping")
        (worker,) = children_of(server.process.pid)
        child = json.loads(server.get("/fork"))["child"]
        try:
            for _ in range(20):
                server.get("/ping")
            reader = Reader(server.directory)
            assert counted(server.directory) == 40
            assert counted(server.directory, "/fork") == 1
            assert reader.read().alive == [0]
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: json.loads(_body(server.port))["pid"] not in (0, worker), 15, "the next worker")
            os.kill(child, 0)  # it lives
            assert slots(server.directory) == ["slot0.lock"]
            assert reader.read().alive == [0]
            reader.close()
        finally:
            os.kill(child, signal.SIGKILL)


def _body(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return '{"pid": 0}'
    finally:
        connection.close()
