"""Whole requests over HTTP, on an app of two routes and on one with 100 further ones.

Microseconds of the server's CPU per request, uvicorn with uvloop and httptools, four connections. *Added* is against
FastAPI's default app, whose own dormant telemetry fastapi-headroom switches off where nobody uses it; the rows "without
FastAPI's telemetry" leave that gain out. Peers count in one process, where they are fastest, and with their defaults.
OpenTelemetry makes spans only: SDK, BatchSpanProcessor, an exporter that throws away.

Microseconds depend on the machine and on its mood, so a budget in them is kept more easily on a fast one; the ratio to
a peer and the share of the bare app's request do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks import serving
from benchmarks.measuring import Row, main, times
from benchmarks.serving import AGAIN, BARE, Table

OFF = "no telemetry"
OURS, TRACED, TRACED_PEER = "headroom", "headroom, tracing 1 %", "opentelemetry 1 %"
PEERS = {
    "instrumentator": "prometheus-fastapi-instrumentator",
    "starlette_exporter": "starlette_exporter",
    TRACED_PEER: "OpenTelemetry, 1 % sampled",
    "opentelemetry 100 %": "OpenTelemetry, 100 % sampled",
}
VARIANTS = (BARE, OFF, OURS, "instrumentator", "starlette_exporter", AGAIN, TRACED, TRACED_PEER, "opentelemetry 100 %")
PATHS = {"/ping": "/ping", "/items/7": "/items/{id}"}


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield the rows of both apps and both paths."""
    for routes in (0, 100):
        tables = serving.take_turns(VARIANTS, tuple(PATHS), routes=routes, quick=quick)
        for path, table in tables.items():
            yield from rows(PATHS[path] + (f", {routes} further routes" if routes else ""), table)
    bare, ours = serving.idle((BARE, OURS), seconds=1.0 if quick else 5.0)
    yield Row("idle: CPU added per second (heartbeat, samples, exporter), and bare", "ms", ours - bare, bare)


def rows(what: str, table: Table) -> Iterator[Row]:
    """Yield what one path cost, whole and added."""
    noise, bare = serving.noise(table), statistics.median(table[BARE])
    ours = serving.added(table, OURS)
    yield Row(f"{what}: bare default app, whole request", "us", None, bare)
    yield Row(f"{what}: the same again, largest difference (noise)", "us", None, noise)
    yield Row(f"{what}: FastAPI's telemetry off", "us", None, serving.added(table, OFF))
    yield Row(f"{what}: added without FastAPI's telemetry", "us", serving.added(table, OURS, OFF), budget=15.0)
    for variant, peer in PEERS.items():
        theirs = serving.added(table, variant)
        ratio, more_than = times(theirs, ours, noise)
        promise = {"budget": 15.0, "least": 4.0} if variant == "instrumentator" else {}
        yield Row(f"{what}: added, and by {peer}", "us", ours, theirs, ratio, more_than, **promise)
    yield Row(f"{what}: added, as a share of the bare app's request", "%", 100 * ours / bare, budget=10.0)
    traced, theirs = serving.added(table, TRACED), serving.added(table, TRACED_PEER)
    ratio, more_than = times(theirs, traced, noise)
    yield Row(
        f"{what}: added with tracing at 1 %, and by OpenTelemetry",
        "us", traced, theirs, ratio, more_than, budget=20.0, least=6.0,
    )  # fmt: skip
    yield Row(f"{what}: the same, as a share", "%", 100 * traced / bare, budget=20.0)


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
