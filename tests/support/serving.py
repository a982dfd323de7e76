"""Runs a real ASGI server on a free loopback port for a test."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from demo_app.stack.process import Process, accepts, free_port

ROOT = Path(__file__).parents[2]


@dataclass
class Serving:
    """A running server."""

    process: Process
    port: int
    directory: Path

    @property
    def url(self) -> str:
        """The address of the app."""
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """Return everything the server has written."""
        return self.process.tail(10_000)

    def get(self, path: str, timeout: float = 60.0) -> str:
        """Return the body of a response. Raises urllib.error.HTTPError for an error status."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return str(response.read().decode())


@contextlib.contextmanager
def serve(
    kind: str, app: str, *, workers: int = 1, env: Mapping[str, str] | None = None, options: tuple[str, ...] = ()
) -> Iterator[Serving]:
    """Run ``module:app`` under uvicorn, gunicorn or gunicorn-preload; the store lies in a folder of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="headroom-test-") as folder:
        directory = Path(folder) / "store"
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "instrumentation")]),
            "HEADROOM_DIRECTORY": str(directory),
            "HEADROOM_PORT": str(free_port()),
            **(env or {}),
        }
        if kind == "uvicorn":
            command = ["-m", "uvicorn", app, "--port", str(port), "--workers", str(workers), "--log-level", "warning"]
        else:
            command = ["-m", "gunicorn", app, "-b", f"127.0.0.1:{port}", "-w", str(workers)]
            command += ["-k", "uvicorn_worker.UvicornWorker"] + (["--preload"] if kind == "gunicorn-preload" else [])
        process = Process(
            kind,
            [sys.executable, *command, *options],
            log=Path(folder) / "server.log",
            env=variables,
            ready=lambda: accepts(port),
        )
        process.start(timeout=60)
        try:
            yield Serving(process, port, directory)
        finally:
            process.stop()
