"""Metrics that the app makes with prometheus_client, in the same scrape as ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from demo_app.stack.process import free_port, wait_until
from tests.exporter.support import serving_sidecar
from tests.support.scrape import Scrape, scrape_until
from tests.support.serving import Serving, serve

APP = "tests.integration.interop_app:app"


def is_in_all(seen: Scrape, orders: int) -> bool:
    return seen.total("shop_orders_total", kind="retail") == orders


def pids(server: Serving, workers: int) -> tuple[list[int], int]:
    """Order until every worker has served; return their pids and how many orders that took."""
    found: dict[int, None] = {}
    count = 0

    def complete() -> bool:
        nonlocal count
        found.setdefault(int(server.get("/order/50")))
        count += 1
        return len(found) == workers

    wait_until(complete, 60, "an order at every worker")
    return list(found), count


def set_level(server: Serving, pid: int, value: float) -> None:
    """Set the gauges of one worker."""
    wait_until(lambda: bool(json.loads(server.get(f"/level/{pid}/{value}"))), 60, "that worker")


def check_totals(seen: Scrape, orders: int) -> None:
    """Check what is the same in both modes."""
    assert seen.total("shop_orders_total", kind="retail") == orders
    assert seen.total("shop_basket_euros_bucket", le="10.0") == 0
    assert seen.total("shop_basket_euros_bucket", le="100.0") == orders
    assert seen.total("shop_basket_euros_bucket", le="+Inf") == orders
    assert seen.total("shop_basket_euros_count") == orders
    assert seen.total("shop_basket_euros_sum") == 50 * orders
    assert seen.total("shop_checkout_seconds_count") == orders
    assert seen.total("shop_checkout_seconds_sum") == 0.5 * orders
    assert "# TYPE shop_checkout_seconds summary" in seen.text
    assert seen.total("shop_build_info", commit="abc") == 1
    assert (seen.total("shop_state", shop_state="open"), seen.total("shop_state", shop_state="closed")) == (1, 0)
    assert seen.total("shop_stock", item="tea") == 7
    assert seen.total("headroom_requests_total", http_route="/order/{amount}", outcome="ok") == orders
    assert "python_info" not in seen.text
    assert "process_virtual_memory_bytes" not in seen.text
    assert "_created" not in seen.text
    names = [line.split()[2] for line in seen.text.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))


@pytest.fixture(params=["uvicorn", "gunicorn", "gunicorn-preload"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server with its own way to make workers."""
    yield request.param


def test_single_process_metrics_of_two_workers_are_in_the_scrape(kind: str) -> None:
    """Without PROMETHEUS_MULTIPROC_DIR the registries of two workers add up: all types, and gauges by their modes."""
    port = free_port()
    with serve(kind, APP, workers=2, env={"HEADROOM_PORT": str(port), "HEADROOM_SAMPLE_INTERVAL": "0.1"}) as server:
        (first, second), orders = pids(server, 2)
        url = f"http://127.0.0.1:{port}"
        one = {"sum": 3, "livesum": 3, "max": 3, "livemax": 3, "mostrecent": 3, "livemostrecent": 3, "all": 3}
        both = one | {"sum": 10, "livesum": 10, "max": 7, "livemax": 7, "min": 3, "livemin": 3}
        both |= dict.fromkeys(("mostrecent", "livemostrecent", "all"), 7)
        # A look takes one metric after the other, and a scrape may fall into it.
        set_level(server, first, 3.0)
        scrape_until(url, lambda s: levels(s, one) == one)  # which of two changes is the latest is seen by looks
        set_level(server, second, 7.0)
        seen = scrape_until(url, lambda s: is_in_all(s, orders) and levels(s, both) == both)
        check_totals(seen, orders)
        assert seen.values("shop_all", "pid") == set()
        assert seen.values("shop_liveall", "pid") == {"slot0", "slot1"}


def levels(seen: Scrape, modes: Iterable[str]) -> dict[str, float]:
    """Return the gauges of some modes."""
    return {mode: seen.total(f"shop_{mode}") for mode in modes}


def test_multiprocess_metrics_of_two_workers_are_in_the_scrape(kind: str, tmp_path: Path) -> None:
    """With PROMETHEUS_MULTIPROC_DIR the files of two workers are merged once, all types and modes, pids as labels."""
    port, store = free_port(), tmp_path / "store"
    store.mkdir()
    env = {
        "HEADROOM_PORT": str(port),
        "HEADROOM_DIRECTORY": str(store),
        "PROMETHEUS_MULTIPROC_DIR": str(store),
        "HEADROOM_SAMPLE_INTERVAL": "0.1",
    }
    with serve(kind, APP, workers=2, env=env) as server:
        (first, second), orders = pids(server, 2)
        set_level(server, first, 3.0)
        set_level(server, second, 7.0)
        url = f"http://127.0.0.1:{port}"
        seen = scrape_until(
            url, lambda s: is_in_all(s, orders) and s.total("shop_stock") == 7 and s.total("shop_build_info") == 1
        )
        check_totals(seen, orders)
        for mode, value in {"sum": 10, "livesum": 10, "max": 7, "livemax": 7, "mostrecent": 7}.items():
            assert seen.total(f"shop_{mode}") == value, mode
        assert seen.total("shop_livemostrecent") == 7
        assert {str(first), str(second)} <= seen.values("shop_all", "pid")

        own = Scrape(server.get("/own-metrics"))  # what an app that serves the directory itself has had all along
        assert own.total("shop_orders_total", kind="retail") == orders
        assert own.total("headroom_requests_total", http_route="/order/{amount}", outcome="ok") == orders
        assert own.total("http_server_request_duration_seconds_count", http_route="/order/{amount}") == orders


def test_a_killed_workers_counts_stay_and_its_successor_goes_on() -> None:
    """Counts of the app's own metrics survive kill -9 of their worker, save for what it had since the last look."""
    port = free_port()
    env = {"HEADROOM_PORT": str(port), "HEADROOM_SAMPLE_INTERVAL": "0.05"}
    with serve("gunicorn", APP, env=env) as server:
        url = f"http://127.0.0.1:{port}"
        before = [int(server.get("/order/50")) for _ in range(5)]
        scrape_until(url, lambda s: is_in_all(s, 5))
        os.kill(before[0], signal.SIGKILL)
        after: list[int] = []

        def ordered() -> bool:
            try:
                after.append(int(server.get("/order/50", timeout=60)))
            except OSError:
                return False
            return True

        wait_until(ordered, 60, "a new worker")
        assert after[0] != before[0]
        seen = scrape_until(url, lambda s: is_in_all(s, 6) and s.total("shop_basket_euros_sum") == 300)
        assert seen.total("headroom_worker_restarts_total") == 1


def test_a_worker_that_ends_in_order_loses_nothing() -> None:
    """What was counted just before SIGTERM is in the next scrape, however long the sample interval is."""
    port = free_port()
    env = {"HEADROOM_PORT": str(port), "HEADROOM_SAMPLE_INTERVAL": "30"}
    with serve("gunicorn", APP, workers=1, env=env) as server:
        pid = int(server.get("/order/50"))
        os.kill(pid, signal.SIGTERM)
        scrape_until(f"http://127.0.0.1:{port}", lambda s: is_in_all(s, 1))


def test_a_collector_that_raises_is_named_and_harms_nothing() -> None:
    """A collector of the app's own that raises is counted and logged once, and everything else is in the scrape."""
    port = free_port()
    with serve("uvicorn", APP, env={"HEADROOM_PORT": str(port), "HEADROOM_SAMPLE_INTERVAL": "0.05"}) as server:
        url = f"http://127.0.0.1:{port}"
        server.get("/order/50")
        scrape_until(url, lambda s: s.total("shop_stock", item="tea") == 7)
        server.get("/break")
        seen = scrape_until(url, lambda s: s.total("headroom_probe_errors_total", probe="registry") >= 3)
        server.get("/order/50")
        scrape_until(url, lambda s: is_in_all(s, 2))
        assert seen.total("headroom_probe_up", probe="registry") == 1
        assert server.log().count("collector Stock failed (RuntimeError: the warehouse does not answer)") == 1


def test_two_apps_on_one_host_do_not_mix() -> None:
    """Each service has a directory of its own by default; the second one on a port names the remedy and serves on."""
    port, names = free_port(), [f"interop-{os.getpid()}-{name}" for name in ("a", "b")]
    stores = [Path("/dev/shm") / f"headroom-{os.getuid()}-{name}" for name in names]
    env = {"HEADROOM_PORT": str(port), "HEADROOM_DIRECTORY": "", "HEADROOM_SERVICE_NAME": names[0]}
    url = f"http://127.0.0.1:{port}"
    try:
        with ExitStack() as stack:
            first = stack.enter_context(serve("uvicorn", APP, env=env))
            first.get("/order/50")
            scrape_until(url, lambda s: is_in_all(s, 1))
            second = stack.enter_context(serve("uvicorn", APP, env=env | {"HEADROOM_SERVICE_NAME": names[1]}))
            second.get("/order/50")
            second.get("/order/50")
            wait_until(lambda: f"port 127.0.0.1:{port} is in use" in second.log(), 60, "the line about the port")
            assert "HEADROOM_PORT" in second.log()
            assert is_in_all(scrape_until(url, lambda s: is_in_all(s, 1)), 1)
            other = free_port()
            with serving_sidecar(stores[1], other):
                scrape_until(f"http://127.0.0.1:{other}", lambda s: is_in_all(s, 2))
    finally:
        for store in stores:
            shutil.rmtree(store, ignore_errors=True)
