"""``init`` under the servers that people use, scraped through the elected exporter."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from demo_app.stack.process import accepts, free_port, wait_until
from tests.support.scrape import Scrape, scrape_until
from tests.support.serving import serve

APP = "tests.support.app:app"


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn", "gunicorn-preload"])
def test_two_workers_are_counted_together(kind: str) -> None:
    """Requests to two workers are each counted once, both workers have a slot, and one of them serves /metrics."""
    port = free_port()
    with serve(kind, APP, workers=2, env={"HEADROOM_PORT": str(port)}) as server:
        url = f"http://127.0.0.1:{port}"
        scrape_until(url, lambda seen: seen.total("headroom_workers", state="alive") == 2)
        with ThreadPoolExecutor(8) as pool:
            pids = {json.loads(body)["pid"] for body in pool.map(server.get, ["/ping"] * 200)}
        duration = "http_server_request_duration_seconds_count"  # known once the last byte is out
        seen = scrape_until(url, lambda s: s.total(duration, http_route="/ping") == 200)
        assert seen.total("headroom_requests_total", http_route="/ping", outcome="ok") == 200
        assert seen.values("headroom_worker_requests_total", "worker") == {"0", "1"}
        assert 1 <= len(pids) <= 2
        assert sorted(path.name for path in server.directory.glob("slot*.lock")) == ["slot0.lock", "slot1.lock"]


def test_a_preloading_master_holds_no_slot() -> None:
    """gunicorn --preload imports and initialises the app in its master, which claims nothing."""
    port = free_port()
    with serve("gunicorn-preload", APP, workers=1, env={"HEADROOM_PORT": str(port)}) as server:
        seen = scrape_until(f"http://127.0.0.1:{port}", lambda s: s.total("headroom_workers", state="alive") == 1)
        assert seen.values("headroom_worker_requests_total", "worker") == {"0"}
        assert [path.name for path in server.directory.glob("slot*.lock")] == ["slot0.lock"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_blocked_loop_is_found_on_both_loops(loop: str) -> None:
    """A handler that sleeps on the loop for 300 ms is named, on asyncio and on uvloop."""
    port = free_port()
    with serve("uvicorn", APP, env={"HEADROOM_PORT": str(port)}, options=("--loop", loop)) as server:
        server.get("/ping")
        server.get("/block?seconds=0.3")

        def blocked(seen: Scrape) -> float:  # a busy machine may hold up the loop elsewhere as well
            name = "headroom_event_loop_blocked_seconds_total"
            sites = [site for site in seen.values(name, "site") if site.startswith("tests.support.app:block")]
            return sum(seen.total(name, site=site) for site in sites)

        scrape_until(f"http://127.0.0.1:{port}", lambda seen: blocked(seen) >= 0.2)


def test_a_worker_that_dies_hands_the_exporter_over() -> None:
    """When the worker that serves /metrics is killed, the other one serves it, and no count is lost."""
    port = free_port()
    with serve("gunicorn", APP, workers=2, env={"HEADROOM_PORT": str(port)}) as server:
        url = f"http://127.0.0.1:{port}"
        pids = set()
        scrape_until(url, lambda s: s.total("headroom_workers", state="alive") == 2)
        for _ in range(50):
            pids.add(json.loads(server.get("/ping"))["pid"])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: accepts(server.port), 60, "gunicorn's new workers")
        scrape_until(url, lambda s: s.total("headroom_requests_total", http_route="/ping", outcome="ok") >= 50)
