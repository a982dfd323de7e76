"""CPU that measuring adds to a trivial request: bare FastAPI, the request probe, all of headroom, and a peer.

    python benchmarks/bench_request.py [--quick] [--routes N]

Two tables in microseconds of CPU per request. *In process* calls the app directly, so that no server dilutes the
difference. *Over HTTP* runs each variant under uvicorn and takes the CPU time of the whole server process from
/proc (Linux only). A machine's speed changes within tens of milliseconds, so variants are measured in adjacent
slices in the order A B C C B A, each slice is scaled by a yardstick loop on the server's CPU, processes are
fresh in every round, and the bare app is measured twice: its difference from itself is the noise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import fastapi_headroom as headroom
from fastapi_headroom import settings
from fastapi_headroom.probes.request import RequestProbe
from fastapi_headroom.store.writer import Writer

VARIANTS = ("bare", "bare again", "no telemetry", "request probe", "headroom", "instrumentator")
PATHS = ("/ping", "/items/7")
CONNECTIONS = 4
Table = dict[str, list[float]]


def make_app(variant: str, routes: int) -> FastAPI:
    """Make the app of a variant, with so many routes before those that are called."""
    off = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(telemetry=off) if variant == "no telemetry" else FastAPI()  # type: ignore[call-arg]
    for number in range(routes):
        app.add_api_route(f"/other/{number}/{{x}}", lambda x: x)

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        return {"ping": "pong"}

    @app.get("/items/{item}")
    async def items(item: int) -> dict[str, int]:
        return {"item": item}

    if variant == "instrumentator":
        from prometheus_client import CollectorRegistry
        from prometheus_fastapi_instrumentator import Instrumentator

        Instrumentator(registry=CollectorRegistry()).instrument(app)
    return app


# ------------------------------------------------------------------- in process
def _scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"accept", b"*/*"), (b"user-agent", b"bench")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(message: Any) -> None:
    pass


async def _slice(app: Callable[..., Awaitable[None]], path: str, requests: int) -> float:
    for _ in range(50):
        await app(_scope(path), _receive, _send)
    start = time.process_time()
    for _ in range(requests):
        await app(_scope(path), _receive, _send)
    return (time.process_time() - start) / requests * 1e6


async def in_process(path: str, rounds: int, requests: int, routes: int) -> Table:
    """Return microseconds per request by variant, one number per round."""
    variants = [variant for variant in VARIANTS if variant != "headroom"]
    apps = {variant: make_app(variant, routes) for variant in variants}
    writer = Writer.in_memory()
    table: Table = {variant: [] for variant in variants}
    for _ in range(rounds):
        taken: Table = {variant: [] for variant in variants}
        for variant in (*variants, *reversed(variants)):
            probe = RequestProbe(settings.load({}))
            if variant == "request probe":
                probe.instrument(apps[variant])
                probe.bind(writer)
            try:
                taken[variant].append(await _slice(apps[variant], path, requests) / yardstick())
            finally:
                probe.close()
        for variant, numbers in taken.items():
            table[variant].append(statistics.mean(numbers))
    return table


# -------------------------------------------------------------------- over HTTP
def yardstick() -> float:
    """Return how long a fixed piece of work takes now, as a multiple of the first time."""
    global _first_yard
    start = time.process_time()
    total = 0
    for number in range(200_000):
        total += number & 3
    taken = time.process_time() - start
    _first_yard = _first_yard or taken
    return taken / _first_yard


_first_yard = 0.0


def serve(variant: str, listener: socket.socket, routes: int) -> None:
    """Serve a variant until killed."""
    import uvicorn

    app = make_app(variant, routes)
    if variant == "headroom":
        headroom.init(app, port=0)
    elif variant == "request probe":
        probe = RequestProbe(settings.load({}), on_first_serve=lambda: probe.bind(Writer.in_memory()))
        probe.instrument(app)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


@contextlib.contextmanager
def server(variant: str, routes: int) -> Iterator[tuple[int, int]]:
    """Run a variant in a process of its own; yield its pid and port. Requests may be sent at once: they wait."""
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryDirectory() as folder:
        descriptor = listener.fileno()
        environment = {**os.environ, "HEADROOM_DIRECTORY": str(Path(folder) / "store")}
        command = [sys.executable, __file__, "--serve", variant, "--fd", str(descriptor), "--routes", str(routes)]
        process = subprocess.Popen(command, env=environment, pass_fds=[descriptor])
        try:
            os.sched_setaffinity(process.pid, {_cpus()[-1]})
            yield process.pid, listener.getsockname()[1]
        finally:
            process.terminate()
            process.wait()


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that all threads of a process have used."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def http_slice(pid: int, port: int, path: str, seconds: float) -> float:
    """Load a server over a few kept connections; return microseconds of its CPU per request."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    try:
        for connection in connections:
            connection.sendall(request)
            length = len(connection.recv(65536))
        served, start, deadline = 0, cpu_seconds(pid), time.monotonic() + seconds
        while time.monotonic() < deadline:
            for connection in connections:
                connection.sendall(request)
            for connection in connections:
                left = length
                while left > 0:
                    left -= len(connection.recv(65536))
            served += CONNECTIONS
        return (cpu_seconds(pid) - start) / served * 1e6
    finally:
        for connection in connections:
            connection.close()


def over_http(path: str, rounds: int, seconds: float, routes: int) -> Table:
    """Return microseconds of server CPU per request by variant, one number per round of fresh processes."""
    table: Table = {variant: [] for variant in VARIANTS}
    all_cpus = set(_cpus())
    ours, theirs = {min(all_cpus)}, {max(all_cpus)}
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            running = {variant: stack.enter_context(server(variant, routes)) for variant in VARIANTS}
            for pid, port in running.values():
                http_slice(pid, port, path, 0.2)  # waits for the server, and warms it up
            taken: Table = {variant: [] for variant in VARIANTS}
            for variant in (*VARIANTS, *reversed(VARIANTS)):
                os.sched_setaffinity(0, theirs)
                before = yardstick()
                os.sched_setaffinity(0, ours)
                spent = http_slice(*running[variant], path, seconds)
                os.sched_setaffinity(0, theirs)
                taken[variant].append(spent / statistics.mean((before, yardstick())))
            os.sched_setaffinity(0, all_cpus)
        for variant, numbers in taken.items():
            table[variant].append(statistics.mean(numbers))
    return table


def show(title: str, table: Table) -> None:
    """Print a table: median per request, and the median of the rounds' differences from the bare app."""
    print(f"\n{title}\n  {'variant':16}{'us/request':>12}{'added':>9}{'of peer':>9}")
    added = {
        variant: statistics.median(a - b for a, b in zip(numbers, table["bare"], strict=True))
        for variant, numbers in table.items()
    }
    for variant, numbers in table.items():
        ratio = added[variant] / added["instrumentator"]
        print(f"  {variant:16}{statistics.median(numbers):12.1f}{added[variant]:+9.1f}{ratio:9.2f}")


def main() -> None:
    """Run the benchmark, or one of its servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: shows that it runs")
    parser.add_argument("--routes", type=int, default=0, help="routes that the app has before those called")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, socket.socket(fileno=arguments.fd), arguments.routes)
        return
    rounds, requests, seconds = (2, 300, 0.3) if arguments.quick else (10, 1000, 2.0)
    for path in PATHS:
        table = asyncio.run(in_process(path, rounds, requests, arguments.routes))
        show(f"GET {path}, in process, microseconds of CPU", table)
    for path in PATHS:
        table = over_http(path, rounds if arguments.quick else 5, seconds, arguments.routes)
        show(f"GET {path}, over HTTP by uvicorn, microseconds of the server's CPU", table)


if __name__ == "__main__":
    main()
