"""Real processes and raw sockets for the exporter's tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from demo_app.stack.process import wait_until
from fastapi_headroom.exporter.pollers import PolledQueue
from fastapi_headroom.probes.queue_adapters import Sample

WORKER = """
import sys, time
from pathlib import Path
from fastapi_headroom import catalog
from fastapi_headroom.store.writer import Writer
writer = Writer.open(Path(sys.argv[1]))
writer.counter(catalog.REQUESTS, "/orders/{id}", "ok").inc(3)
writer.histogram(catalog.REQUEST_LATENCY, "/orders/{id}").observe(0.2)
writer.gauge(catalog.LOOP_UTILIZATION, writer.worker).set(0.25)
print("ready", flush=True)
time.sleep(120)
"""
CANDIDATE = """
import logging, sys, time
from pathlib import Path
from fastapi_headroom import settings
from fastapi_headroom.exporter.election import Election
logging.basicConfig(level=logging.INFO)
election = Election(settings.load({}, directory=Path(sys.argv[1]), port=int(sys.argv[2])))
election.start()
print("ready", flush=True)
time.sleep(120)
"""


class Child:
    """A Python process whose standard error is kept."""

    def __init__(self, command: list[str], *, ready: bool = True, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**_environment(), **(env or {})},
        )
        self.errors: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        assert self.process.stdout is not None
        if ready:
            assert self.process.stdout.readline() == "ready\n", "".join(self.errors)

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return "".join(self.errors)

    def wait(self, seconds: float = 60.0) -> int:
        status = self.process.wait(seconds)
        self._reading.join(5)
        return status

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.wait()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)


def worker(directory: Path) -> Child:
    """Start a process that has written a few series and lives on."""
    return Child(["-c", WORKER, str(directory)])


def candidate(directory: Path, port: int) -> Child:
    """Start a process that stands for election."""
    return Child(["-c", CANDIDATE, str(directory), str(port)])


def sidecar(*arguments: str, env: dict[str, str] | None = None) -> Child:
    """Start ``headroom sidecar`` with arguments."""
    return Child(["-m", "fastapi_headroom.cli", "sidecar", *arguments], ready=False, env=env)


@contextlib.contextmanager
def serving_sidecar(directory: Path, port: int, *arguments: str) -> Iterator[Child]:
    """Start a sidecar and wait until it answers."""
    with sidecar("--dir", str(directory), "--port", str(port), *arguments) as child:
        try:
            wait_until(lambda: answers(port), 60, "the sidecar's first answer")
        except TimeoutError:
            raise AssertionError(child.log()) from None
        yield child


def get(port: int, path: str = "/metrics", timeout: float = 30.0, method: str = "GET", **headers: str) -> Response:
    """Ask once, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return Response(connection.getresponse())
    finally:
        connection.close()


class Response:
    """A response that was read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def answers(port: int) -> bool:
    """Return whether /healthz answers."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, "/healthz", timeout=1.0).status == 200
    return False


def exporter_pid(port: int) -> int | None:
    """Return the process that listens on a loopback port, as the kernel tells."""
    wanted = f"0100007F:{port:04X}"
    inodes = {
        fields[9]
        for fields in (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[1] == wanted and fields[3] == "0A"
    }
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                for descriptor in (process / "fd").iterdir():
                    target = str(descriptor.readlink())
                    if target.startswith("socket:[") and target[8:-1] in inodes:
                        return int(process.name)
    return None


def half_open(port: int, sent: bytes = b"") -> socket.socket:
    """Open a connection, send what is no whole request, and fall silent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    if sent:
        connection.sendall(sent)
    return connection


def eventually(condition: Callable[[], bool], what: str, seconds: float = 40.0) -> float:
    """Wait until a condition holds and return how many seconds that took."""
    began = time.monotonic()
    wait_until(condition, seconds, what)
    return time.monotonic() - began


def _environment() -> dict[str, str]:
    left_out = ("HEADROOM_", "PROMETHEUS_MULTIPROC_DIR", "WEB_CONCURRENCY", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


class Broker:
    """A poller that answers what it is told, or raises."""

    name = "broker"

    def __init__(self, *samples: Sample) -> None:
        self.samples: list[Sample] = list(samples)
        self.error: Exception | None = None
        self.closed = False

    def poll(self) -> list[Sample]:
        if self.error is not None:
            raise self.error
        return list(self.samples)

    def close(self) -> None:
        self.closed = True


def polled(broker: Broker, *, up: bool = True) -> PolledQueue:
    """Start to poll a broker, and wait for the first result."""
    queue = PolledQueue("celery+redis://broker/0", lambda _: broker, interval=0.02)
    queue.start()
    eventually(lambda: queue.up is up, "the first poll")
    return queue
