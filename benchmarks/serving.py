"""Real servers under load: whole requests over HTTP, in microseconds of the server process's CPU (Linux only).

All variants run at once, on one CPU; the client is on another. Each is loaded in turn for a few hundredths of a
second, there and back (A B C C B A), many times over, so that every variant meets the machine in the same moods. The
bare app is the yardstick: a turn's figures count as multiples of what the bare app took in that turn. Processes are
fresh in every round, and the bare app runs twice: its difference from itself is the noise.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CONNECTIONS = 4
SLICE = 0.03
"""Seconds that a variant is loaded before it is the next one's turn."""
SETTLE = 0.001
"""Seconds that a server is given to finish what it does after a response."""
BARE, AGAIN = "bare", "bare again"
Table = dict[str, list[float]]


class Server:
    """A variant in a process of its own, with a few kept connections."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, store: Path) -> None:
        self.process, self.pid, self.port, self.store = process, process.pid, port, store
        self._connections: list[socket.socket] = []

    def get(self, path: str, method: str = "GET") -> bytes:
        """Return one response. The first request waits until the server is up."""
        connection = self._connect(1)[0]
        connection.sendall(_request(path, method))
        return _response(connection)

    def load(self, path: str, seconds: float) -> float:
        """Load the server; return microseconds of its CPU per request."""
        connections, request = self._connect(CONNECTIONS), _request(path)
        length = len(self.get(path))
        time.sleep(SETTLE)
        served, before, deadline = 0, self.cpu_seconds(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            for connection in connections:
                connection.sendall(request)
            for connection in connections:
                left = length
                while left > 0:
                    part = len(connection.recv(65536))
                    if not part:
                        raise ConnectionError("the server closed the connection")
                    left -= part
            served += CONNECTIONS
        time.sleep(SETTLE)
        return (self.cpu_seconds() - before) / served * 1e6

    def cpu_seconds(self) -> float:
        """Return the CPU time that all threads of the process have used."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def memory(self, field: str = "VmRSS") -> float:
        """Return a field of the process's status in MiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
        raise KeyError(field)

    def exporter(self) -> str:
        """Return the URL of the metrics: that of the socket the process listens on besides the one it serves."""
        mine = set()
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # others come and go
                mine.add(str(descriptor.readlink()).removeprefix("socket:[").rstrip("]"))
        rows = [line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        listening = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in mine}
        return f"http://127.0.0.1:{(listening - {self.port}).pop()}/metrics"

    def close(self) -> None:
        """Stop the process."""
        for connection in self._connections:
            connection.close()
        self.process.terminate()
        self.process.wait()

    def _connect(self, count: int) -> list[socket.socket]:
        while len(self._connections) < count:
            connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
        return self._connections


def environment(store: Path) -> dict[str, str]:
    """Return the variables of a process that keeps its store there, and has no other setting of this one's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HEADROOM_", "OTEL_"))}
    clean.pop("PROMETHEUS_MULTIPROC_DIR", None)  # peers count in one process, where they are fastest
    return {**clean, "HEADROOM_DIRECTORY": str(store)}


@contextlib.contextmanager
def server(variant: str, *, routes: int = 0, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a variant on the last CPU, with a store of its own in memory where there is such a file system."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        socket.create_server(("127.0.0.1", 0), backlog=128) as listener,
        tempfile.TemporaryDirectory(prefix="headroom-bench-", dir=memory) as folder,
    ):
        descriptor, store = listener.fileno(), Path(folder) / "store"
        command = [sys.executable, "-m", "benchmarks.apps", variant, "--fd", str(descriptor), "--routes", str(routes)]
        running = Server(
            subprocess.Popen(command, env={**environment(store), **(env or {})}, pass_fds=[descriptor]),
            listener.getsockname()[1],
            store,
        )
        try:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(running.pid, {max(os.sched_getaffinity(0))})
            yield running
        finally:
            running.close()


def take_turns(
    variants: Sequence[str],
    paths: Sequence[str],
    *,
    quick: bool,
    routes: int = 0,
    env: Mapping[str, str] | None = None,
) -> dict[str, Table]:
    """Return, by path and variant, one figure per round of fresh processes: microseconds of CPU per request."""
    rounds, turns = (1, 2) if quick else (8, 10)
    tables: dict[str, Table] = {path: {variant: [] for variant in variants} for path in paths}
    cpus = os.sched_getaffinity(0)
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            servers = {v: stack.enter_context(server(v, routes=routes, env=env)) for v in variants}
            try:
                os.sched_setaffinity(0, {min(cpus)})
                for path in paths:
                    for running in servers.values():
                        running.load(path, 0.3)  # warms it up
                    for variant, figure in _turns(servers, path, turns).items():
                        tables[path][variant].append(figure)
            finally:
                os.sched_setaffinity(0, cpus)
    return tables


def _turns(servers: dict[str, Server], path: str, turns: int) -> dict[str, float]:
    taken: Table = {variant: [] for variant in servers}
    for _ in range(turns):
        spent = dict.fromkeys(servers, 0.0)
        for variant in (*servers, *reversed(servers)):
            spent[variant] += servers[variant].load(path, SLICE) / 2
        for variant, figure in spent.items():
            taken[variant].append(figure)
    bare = statistics.median(taken[BARE])
    return {
        variant: bare * statistics.median(a / b for a, b in zip(figures, taken[BARE], strict=True))
        for variant, figures in taken.items()
    }


CALM = 3.0
"""Seconds after the last request in which a server may still be at work."""


def idle(variants: Sequence[str], seconds: float) -> list[float]:
    """Return the milliseconds of CPU that each variant takes in a second in which nobody calls it."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server(variant)) for variant in variants]
        for running in servers:
            running.load("/ping", 0.3)
        time.sleep(CALM)
        before = [running.cpu_seconds() for running in servers]
        time.sleep(seconds)
        return [(running.cpu_seconds() - start) / seconds * 1e3 for running, start in zip(servers, before, strict=True)]


def added(table: Table, variant: str, base: str = BARE) -> float:
    """Return what a variant takes more than another, in microseconds: the median of the rounds."""
    return statistics.median(a - b for a, b in zip(table[variant], table[base], strict=True))


def noise(table: Table) -> float:
    """Return what the bare app differs from itself in the worst round, in microseconds."""
    return max(abs(a - b) for a, b in zip(table[AGAIN], table[BARE], strict=True))


def _request(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def _response(connection: socket.socket) -> bytes:
    data = b""
    while True:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the server closed the connection")
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        if end:
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            if len(body) >= length:
                return data
