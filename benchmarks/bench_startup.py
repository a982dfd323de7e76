"""What ``init()`` adds to start-up: from the start of the process to the first response over HTTP.

Wall time, fresh processes in the order A B B A, medians of the pairs. Then its parts, in milliseconds of one process
that has imported FastAPI: importing fastapi_headroom, the call of ``init()``, and what the process does before it
serves its first request (slot, hooks, threads). The column "peer" is the bare app. All of it with the byte code that
pip writes when it installs a package: a checkout of the sources may have none, and would be compiled at each start.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

from benchmarks import serving
from benchmarks.measuring import Row, main

PARTS = """
import sys, time, asyncio
from benchmarks.apps import make_app
import uvicorn, httptools, uvloop
app = make_app("bare", 0)
began = time.perf_counter()
from fastapi_headroom import wiring
imported = time.perf_counter()
served, first_serve = [], wiring.Runtime.first_serve
def timed(*arguments):
    started = time.perf_counter()
    first_serve(*arguments)
    served.append(time.perf_counter() - started)
wiring.Runtime.first_serve = timed
again = time.perf_counter()
wiring.init(app, port=0, directory=sys.argv[1])
initialised = time.perf_counter()
async def serve():
    async def receive(): return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message): pass
    scope = {"type": "http", "method": "GET", "path": "/ping", "raw_path": b"/ping", "query_string": b"",
             "root_path": "", "headers": [], "client": None, "server": None, "scheme": "http", "http_version": "1.1"}
    await app(scope, receive, send)
asyncio.run(serve())
print(imported - began, initialised - again, sum(served))
"""


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield the whole and the parts."""
    with tempfile.TemporaryDirectory(prefix="headroom-bench-") as folder:
        yield from rows(quick, {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""})


def rows(quick: bool, env: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of processes that find their byte code where ``env`` says; the first of each writes it."""
    first_response("bare", env)
    first_response("headroom", env)
    measure_parts(env)
    bare, ours = [], []
    for _ in range(2 if quick else 12):
        first, second = first_response("bare", env), first_response("headroom", env)
        second += first_response("headroom", env)
        first += first_response("bare", env)
        bare.append(first / 2)
        ours.append(second / 2)
    added = statistics.median(b - a for a, b in zip(bare, ours, strict=True))
    yield Row("process start to first response: added, and bare", "ms", added, statistics.median(bare), budget=150.0)
    parts = [measure_parts(env) for _ in range(2 if quick else 9)]
    for name, figures in zip(("import", "init()", "before the first request"), zip(*parts, strict=True), strict=True):
        yield Row(f"of that: {name}", "ms", statistics.median(figures))


def first_response(variant: str, env: Mapping[str, str]) -> float:
    """Return the milliseconds from before a process is started to its first response."""
    began = time.perf_counter()
    with serving.server(variant, env=env) as running:
        running.get("/ping")
        return (time.perf_counter() - began) * 1e3


def measure_parts(env: Mapping[str, str]) -> list[float]:
    """Return the milliseconds of the import, of ``init()`` and of what comes before the first request."""
    with tempfile.TemporaryDirectory(prefix="headroom-bench-") as folder:
        command = [sys.executable, "-c", PARTS, folder]
        environment = {**os.environ, **env}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return [float(word) * 1e3 for word in output.split()]


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
