"""The whole thread: a fault in an app, the sidecar, Prometheus with the shipped rules, Alertmanager, a webhook."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from demo_app.inbox import Inbox, make_server
from demo_app.stack import config
from demo_app.stack.process import Process, accepts, free_port, wait_until
from demo_app.stack.rules import write_scaled
from demo_app.stack.servers import Alertmanager, Prometheus
from tests.support.serving import ROOT, Serving, serve

pytestmark = pytest.mark.alone

FACTOR = 60.0


@contextmanager
def load(server: Serving, path: str, threads: int = 2) -> Iterator[None]:
    """Ask for a path without a pause, from some threads."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                server.get(path, timeout=5)
            except OSError:
                pass

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(ask)
        try:
            yield
        finally:
            stop.set()


@contextmanager
def alerting(folder: Path, target: str, inbox_port: int) -> Iterator[None]:
    """Run Prometheus with the shipped rules, faster, and Alertmanager with the shipped routes."""
    shipped = ROOT / "alerts"
    receivers = config.write_alertmanager(
        folder / "alertmanager.yml", shipped=shipped / "alertmanager.yml", inbox=f"http://127.0.0.1:{inbox_port}"
    )
    with Alertmanager(folder / "alertmanager", receivers) as alertmanager:
        write_scaled(shipped, folder / "rules", FACTOR)
        rules = config.write_prometheus(
            folder / "prometheus.yml",
            target=target,
            alertmanager=f"127.0.0.1:{alertmanager.port}",
            rules=folder / "rules",
            scrape_interval=1.0,
        )
        with Prometheus(folder / "prometheus", rules):
            yield


@pytest.fixture
def inbox() -> Iterator[tuple[Inbox, int]]:
    """An inbox that listens."""
    box, port = Inbox(), free_port()
    server = make_server("127.0.0.1", port, box)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield box, port
    server.shutdown()
    server.server_close()


def test_a_blocked_loop_reaches_the_inbox_and_resolves(tmp_path: Path, inbox: tuple[Inbox, int]) -> None:
    """A handler that blocks the loop brings HeadroomEventLoopBlocked with its site, which resolves when it stops."""
    box, inbox_port = inbox
    port = free_port()
    variables = {"HEADROOM_EXPORTER": "false"}

    def blocked(state: Callable[[float | None], bool]) -> bool:
        return any(a.name == "HeadroomEventLoopBlocked" and state(a.resolved) for a in box.alerts())

    with ExitStack() as stack:
        server = stack.enter_context(serve("uvicorn", "tests.support.app:app", env=variables))
        stack.enter_context(
            Process(
                "sidecar",
                [
                    sys.executable,
                    "-m",
                    "fastapi_headroom.cli",
                    "sidecar",
                    "--dir",
                    server.directory,
                    "--port",
                    str(port),
                ],
                log=tmp_path / "sidecar.log",
                ready=lambda: accepts(port),
            )
        )
        stack.enter_context(alerting(tmp_path, f"127.0.0.1:{port}", inbox_port))
        stack.enter_context(load(server, "/ping", threads=1))
        with load(server, "/block?seconds=0.3"):
            wait_until(lambda: blocked(lambda resolved: resolved is None), 40, "the alert in the inbox")
        alert = next(a for a in box.alerts() if a.name == "HeadroomEventLoopBlocked")
        assert alert.labels["site"].startswith("tests.support.app:block")
        assert "tests.support.app:block" in alert.description
        wait_until(lambda: blocked(lambda resolved: resolved is not None), 40, "the alert's resolution")
