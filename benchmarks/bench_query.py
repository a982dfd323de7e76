"""Whole requests with one query and one cache read, on a real PostgreSQL (asyncpg) and Redis.

As *Whole requests*, over loopback TCP, pool and cache probes included; a pool of five connections, never overflowing,
and an entry that is there.
OpenTelemetry instruments FastAPI and SQLAlchemy; nothing of its kind is installed for Redis.
prometheus-fastapi-instrumentator sees the request alone.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from redis import Redis as SyncRedis

from benchmarks import serving
from benchmarks.measuring import Row, main, times
from benchmarks.serving import AGAIN, BARE
from demo_app.stack.servers import Postgres, Redis

PEERS = {"instrumentator": "prometheus-fastapi-instrumentator", "opentelemetry 1 %": "OpenTelemetry, 1 % sampled"}
VARIANTS = (BARE, "headroom", "instrumentator", AGAIN, "opentelemetry 1 %")


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield what the request costs, whole and added."""
    with tempfile.TemporaryDirectory(prefix="headroom-bench-") as folder:
        postgres, redis = Postgres(Path(folder) / "postgres"), Redis(Path(folder) / "redis")
        started = []
        cpus = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(cpus)})  # the databases inherit it: the last CPU is the app's alone
            for running in (postgres, redis):
                running.start()
                started.append(running)
            os.sched_setaffinity(0, cpus)
            with SyncRedis.from_url(redis.url) as client:
                client.set("org:7:plan", "pro")
            env = {"BENCH_POSTGRES": postgres.url(), "BENCH_REDIS": redis.url}
            table = serving.take_turns(VARIANTS, ("/order",), quick=quick, env=env)["/order"]
        finally:
            for running in started:
                running.stop()
    noise, ours, bare = serving.noise(table), serving.added(table, "headroom"), statistics.median(table[BARE])
    yield Row("bare default app, whole request", "us", None, bare)
    yield Row("the same again, largest difference (noise)", "us", None, noise)
    for variant, peer in PEERS.items():
        theirs = serving.added(table, variant)
        ratio, more_than = times(theirs, ours, noise)
        yield Row(f"added, and by {peer}", "us", ours, theirs, ratio, more_than, budget=30.0)
    yield Row("added, as a share of the bare app's request", "%", 100 * ours / bare, budget=20.0)


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
