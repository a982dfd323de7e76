"""Workers that stand still, and clocks that do not: a sidecar answers all the while, and no number depends on it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from demo_app.stack.process import free_port
from tests.support.scrape import scrape, scrape_until
from tests.support.serving import Serving, serve
from tests.support.survival import APP, OK, Clients, scrape_timed, sidecar

pytestmark = pytest.mark.alone

STALL_SECONDS = 5.0


def stall(server: Serving, path: str) -> threading.Thread:
    """Ask for something that takes its worker out for a while."""

    def run() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.get(path, timeout=STALL_SECONDS + 10)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_sidecar_answers_while_every_worker_stands_still(tmp_path: Path) -> None:
    """One worker holds the GIL for 5 s, one blocks its loop for 5 s, one is stopped by SIGSTOP: each scrape answers
    within 100 ms with all that they had counted, and then all three go on."""
    store = tmp_path / "store"
    env = {"HEADROOM_DIRECTORY": str(store)}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(sidecar(store))
        holding, blocked, stopped = (stack.enter_context(serve("uvicorn", APP, env=env)) for _ in range(3))
        servers = (holding, blocked, stopped)
        for server in servers:
            for _ in range(10):
                pid = json.loads(server.get("/ping"))["pid"]
        scrape_until(url, lambda s: s.total("headroom_workers", state="alive") == 3)
        os.kill(pid, signal.SIGSTOP)
        threads = [stall(holding, f"/gil?seconds={STALL_SECONDS}"), stall(blocked, f"/block?seconds={STALL_SECONDS}")]
        began, scrapes = time.monotonic(), 0
        try:
            time.sleep(0.3)
            while time.monotonic() - began < STALL_SECONDS - 1.5:
                seen, seconds = scrape_timed(url)
                scrapes += 1
                assert seconds < 0.1
                assert seen.total(OK, http_route="/ping") == 30
                assert seen.total("headroom_workers", state="alive") == 3
                assert seen.total("headroom_slots_unreadable") == 0
                time.sleep(0.1)
            assert all(thread.is_alive() for thread in threads)
        finally:
            os.kill(pid, signal.SIGCONT)
            for thread in threads:
                thread.join()
        assert scrapes > 10
        for server in servers:
            server.get("/ping")
        assert scrape(url).total(OK, http_route="/ping") == 33
        # the worker that blocked its loop could watch it; the one that held the GIL could not, and says so later
        seen = scrape_until(url, lambda s: s.total("headroom_event_loop_blocked_seconds_total") > STALL_SECONDS)
        assert seen.total(OK, http_route="/gil") == seen.total(OK, http_route="/block") == 1


def test_a_wall_clock_that_leaps_changes_no_number() -> None:
    """With a clock that jumps by years at every look requests are counted and timed as they were, and scrapes work."""
    port = free_port()
    with serve("uvicorn", APP, env={"SURVIVOR_CLOCK": "jumps", "HEADROOM_PORT": str(port)}) as server:
        with Clients(server.port, pause=0.002) as clients:
            url = f"http://127.0.0.1:{port}"
            scrape_until(url, lambda s: s.total(OK, http_route="/ping") > 200)
            began = time.monotonic()
            server.get("/sleep?seconds=0.2")
            took = time.monotonic() - began
        seen, seconds = scrape_timed(url)
        assert set(clients.statuses) == {200}
        assert seen.total(OK, http_route="/ping") == clients.answered
        assert 0.2 <= seen.total("http_server_request_duration_seconds_sum", http_route="/sleep") <= took
        assert 0 < seen.total("http_server_request_duration_seconds_sum", http_route="/ping") < 0.5 * clients.answered
        assert seen.total("headroom_event_loop_delay_max_seconds") < 60
        bad = [
            row
            for row in seen.samples
            if row[2] < 0 or (row[2] > 1e6 and "bytes" not in row[0] and "_fds" not in row[0])
        ]
        assert not [row for row in bad if row[0] != "process_start_time_seconds"]
        assert seconds < 0.5
