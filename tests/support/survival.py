"""What tests of survival share: a sidecar, a small disk, and clients that count their answers."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.stack.process import free_port
from fastapi_headroom.store.reader import Reader
from tests.exporter.support import serving_sidecar
from tests.support.scrape import Scrape, scrape
from tests.support.serving import Serving

APP = "tests.support.survivor:app"
OK = "headroom_requests_total"


@contextlib.contextmanager
def sidecar(directory: Path) -> Iterator[str]:
    """Run a sidecar over a store and yield its address."""
    port = free_port()
    with serving_sidecar(directory, port):
        yield f"http://127.0.0.1:{port}"


def scrape_timed(url: str, times: int = 5) -> tuple[Scrape, float]:
    """Scrape several times; return the last scrape and the median of the seconds that one took."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        seen = scrape(url)
        took.append(time.monotonic() - began)
    return seen, sorted(took)[times // 2]


class Disk:
    """A file system in memory, of a size and with rights that change."""

    def __init__(self, path: Path, size: str) -> None:
        self.path = path
        path.mkdir()
        mounted = self._mount("-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs")
        if mounted.returncode:
            pytest.skip("no right to mount a file system")

    def remount(self, options: str) -> None:
        """Change its size or rights: ``size=8m``, ``ro``, ``rw``."""
        done = self._mount("-o", f"remount,{options}")
        assert done.returncode == 0, done.stderr

    def unmount(self) -> None:
        """Let go of it, used or not."""
        subprocess.run(["umount", "-l", self.path], check=True)

    def _mount(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["mount", *arguments, self.path], capture_output=True, check=False)


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Disk]:
    """Mount a small file system for the length of a block; skips the test without the right to."""
    made = Disk(folder / "disk", size)
    try:
        yield made
    finally:
        made.unmount()


def counted(directory: Path, route: str = "/ping") -> float:
    """Return how many requests of a route the files of a store hold."""
    reader = Reader(directory)
    try:
        values = reader.read().values()
    finally:
        reader.close()
    return sum(value for (name, labels), value in values.items() if name == OK and ("http_route", route) in labels)


class Clients:
    """Clients that ask without end and count what they asked and what was answered."""

    def __init__(self, port: int, path: str = "/ping", number: int = 4, pause: float = 0.0) -> None:
        self.asked = self.answered = 0
        self.statuses: Counter[int] = Counter()
        self._port, self._path, self._pause = port, path, pause
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        asked = answered = 0
        statuses: Counter[int] = Counter()
        connection: http.client.HTTPConnection | None = None
        while not self._stop.wait(self._pause):
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
                    connection.connect()
                asked += 1
                connection.request("GET", self._path)
                response = connection.getresponse()
                response.read()
                statuses[response.status] += 1
                answered += 1
            except (OSError, http.client.HTTPException):
                connection = None
        with self._lock:
            self.asked += asked
            self.answered += answered
            self.statuses += statuses


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in tasks.read_text().split()]
    except OSError:
        return []


def kill_workers_at_random(server: Serving, seconds: float, seed: int) -> tuple[Clients, int]:
    """Kill gunicorn's workers by SIGKILL now and then while clients ask; return the clients and the kills."""
    chance, kills = random.Random(seed), 0
    end = time.monotonic() + seconds
    with Clients(server.port, pause=0.002) as clients:
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.2, 1.0))
            workers = children_of(server.process.pid)
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    kills += 1
    return clients, kills
