"""Is the recommended pool size right? An experiment with real checkouts on a real PostgreSQL.

For each workload: watch it at some starting size for a while, as an exporter would from outside, and take the
advice; then run the same arrivals with pools of the recommended size and of three quarters of it, and measure the waits
in the app. The advice passes when its p95 wait is at or under the target and either three quarters of it is not, or it
is within one connection of the smallest size that does. ``python -m benchmarks.bench_advisor`` prints the table; names
of workloads as arguments run only those.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi_headroom import thresholds

SECONDS = 15.0
TARGET = thresholds.POOL_TARGET_WAIT_P95
POOL = "shop"
Plan = list[tuple[float, float]]
"""When each checkout is asked for, and how long it is held."""


@dataclass(frozen=True)
class Workload:
    """How checkouts come and how long they hold. ``rates`` has one entry per worker."""

    arrivals: str
    rates: tuple[float, ...]
    hold: Callable[[random.Random], float]
    start: int
    """The size of the pool while it is watched."""
    together: int = 1
    sleeps: str = "app"
    """Where the hold is spent: ``app`` (asyncio.sleep) or ``database`` (pg_sleep)."""


def _exponential(mean: float) -> Callable[[random.Random], float]:
    return lambda rng: rng.expovariate(1 / mean)


def _long_tail(rng: random.Random) -> float:
    return rng.expovariate(1 / 0.01) if rng.random() < 0.95 else rng.expovariate(1 / 0.5)


WORKLOADS = {
    "steady": Workload("clockwork", (80,), lambda _: 0.05, 12),
    "chance": Workload("chance", (80,), _exponential(0.06), 20),
    "bursty": Workload("bursts", (24,), _exponential(0.05), 24, together=12),
    "long-tailed": Workload("chance", (60,), _long_tail, 16),
    "mixed routes": Workload("chance", (90,), lambda rng: rng.choice((0.005, 0.005, 0.03, 0.1)), 16, sleeps="database"),
    "many short": Workload("chance", (200,), _exponential(0.008), 12),
    "few long": Workload("chance", (5,), _exponential(1.0), 20),
    "two workers": Workload("chance", (40, 80), _exponential(0.06), 20),
    "saturated start": Workload("chance", (80,), _exponential(0.06), 5),
    "overloaded start": Workload("chance", (80,), _exponential(0.06), 3),
    "bursty, small start": Workload("bursts", (24,), _exponential(0.05), 6, together=12),
    "crowd, small start": Workload("crowd", (12,), _exponential(0.04), 4),
}
"""For ``crowd`` the rate is the number of callers, each of which comes again as soon as it was served."""


def plan(workload: Workload, worker: int, seconds: float) -> Plan:
    """Return a worker's checkouts: the same on every run."""
    rng = random.Random(f"{workload.arrivals} {workload.rates} {worker}")
    found: Plan = []
    for at in _arrivals(workload, worker, rng):
        if at > seconds:
            return found
        found.append((at, workload.hold(rng)))
    return found


def _arrivals(workload: Workload, worker: int, rng: random.Random) -> Iterator[float]:
    at, rate = 0.0, workload.rates[worker]
    while True:
        if workload.arrivals == "clockwork":
            at += 1 / rate
        else:
            at += rng.expovariate(rate / workload.together)
        for _ in range(workload.together):
            yield at


def ideal_size(workload: Workload, seconds: float) -> int:
    """Return the smallest size for the worst worker's checkouts, replayed through an ideal pool."""
    if workload.arrivals == "crowd":
        return int(workload.rates[0])
    size = 1
    for worker in range(len(workload.rates)):
        checkouts = plan(workload, worker, seconds)
        while _late(checkouts, size) > 0.05 * len(checkouts):
            size += 1
    return size


def _late(checkouts: Plan, size: int) -> int:
    free, late = [0.0] * size, 0
    for asked, hold in checkouts:
        start = max(asked, free[0])
        heapq.heapreplace(free, start + hold)
        late += start - asked > TARGET
    return late


async def work(workload: Workload, worker: int, url: str, directory: Path, size: int, seconds: float) -> dict[str, Any]:
    """Run one worker's checkouts against a pool of a size; return the waits as the app saw them."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    from fastapi_headroom.probes.pool import PoolProbe
    from fastapi_headroom.settings import load
    from fastapi_headroom.store.writer import Writer

    probe = PoolProbe(load({}))
    probe.bind(Writer.open(directory))
    engine = create_async_engine(url, pool_size=size, max_overflow=0, pool_timeout=120, pool_logging_name=POOL)
    for connection in [await engine.connect() for _ in range(size)]:
        await connection.execute(text("SELECT 1"))
        await connection.close()
    probe.sample()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    waits: list[float] = []
    statement = text("SELECT pg_sleep(:seconds)")

    async def checkout(hold: float) -> None:
        asked = time.perf_counter()
        async with engine.connect() as connection:
            waits.append(time.perf_counter() - asked)
            if workload.sleeps == "database":
                await connection.execute(statement, {"seconds": hold})
            else:
                await asyncio.sleep(hold)

    began = time.perf_counter()
    if workload.arrivals == "crowd":
        rng = random.Random(1)

        async def caller() -> None:
            while time.perf_counter() - began < seconds:
                await checkout(workload.hold(rng))

        await asyncio.gather(*(caller() for _ in range(int(workload.rates[worker]))))
    else:
        async with asyncio.TaskGroup() as group:
            for at, hold in plan(workload, worker, seconds):
                if (ahead := began + at - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                group.create_task(checkout(hold))
            if (ahead := began + seconds - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            print("watched", flush=True)  # what is still in line is served, but not watched
            probe.sample()
    print("done " + json.dumps({"p95": sorted(waits)[int(0.95 * len(waits))], "checkouts": len(waits)}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await engine.dispose()
    return {}


class Workers:
    """The processes of one phase."""

    def __init__(self, name: str, url: str, directory: Path, size: int, seconds: float) -> None:
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "benchmarks.bench_advisor", name, "--worker", str(worker), "--url", url,
                    "--directory", str(directory), "--size", str(size), "--seconds", str(seconds),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for worker in range(len(WORKLOADS[name].rates))
        ]  # fmt: skip
        self.watched = threading.Event()
        self.results: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Start the traffic once all are ready."""
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        self._tell()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            for line in process.stdout:
                self.watched.set()
                if line.startswith("done "):
                    self.results.append(json.loads(line.removeprefix("done ")))
                    break

    def end(self) -> float:
        """Wait for the last checkout; return the p95 wait of the worst worker."""
        while len(self.results) < len(self.processes):
            if any(process.poll() for process in self.processes):
                raise RuntimeError("a worker of the experiment failed")
            time.sleep(0.05)
        self._tell()
        for process in self.processes:
            process.wait()
        return max(float(result["p95"]) for result in self.results)

    def _tell(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()


def observe(name: str, url: str, size: int, seconds: float) -> tuple[float, dict[str, float]]:
    """Run a workload at a size; return its p95 wait and what the advisor says, by metric and size."""
    from fastapi_headroom import catalog
    from fastapi_headroom.exporter.pool_advisor import PoolAdvisor

    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(name, url, Path(folder), size, seconds)
        workers.begin()
        advisor = PoolAdvisor(Path(folder), least_seconds=5, least_checkouts=50)
        while not workers.watched.is_set():
            advisor.look()
            workers.watched.wait(1.0)
        advisor.look()
        waited = workers.end()
    said = {
        (values[1] if metric is catalog.POOL_PREDICTED_WAIT else metric.name): value
        for metric, values, value in advisor.rows()
    }
    return waited, said


def experiment(name: str, url: str, seconds: float) -> str:
    """Return a workload's row of the table."""
    workload = WORKLOADS[name]
    before, said = observe(name, url, workload.start, seconds)
    size = int(said["headroom_pool_recommended_size"])
    at, _ = observe(name, url, size, seconds)
    less = max(1, int(0.75 * size))
    below, _ = observe(name, url, less, seconds) if less < size else (float("inf"), {})
    passed = at <= TARGET and below > TARGET
    note = "three quarters is too small"
    if not passed:
        # not by three quarters: then by the smallest size that does
        smallest, tried = (size, at) if at <= TARGET else (size + 1, observe(name, url, size + 1, seconds)[0])
        passed, note = tried <= TARGET, f"{size + 1} is enough: within one"
        if at <= TARGET and size > 2:
            lower, _ = observe(name, url, size - 2, seconds)
            passed = lower > TARGET
            note = f"{size - 2}: {_ms(lower)}, so within one" if passed else f"{size - 2} would do: {_ms(lower)}"
        elif not passed:
            note = f"{smallest}: {_ms(tried)}"
    cells = (
        name, f"{workload.start}: {_ms(before)}", f"{size}", f"{ideal_size(workload, seconds)}", _ms(said.get("1x")),
        _ms(at), f"{less}: {_ms(below)}", "yes" if passed else "NO", note,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None or seconds == float("inf") else f"{seconds * 1e3:.1f} ms"


HEADING = (
    "| workload | watched at: p95 | recommended | ideal pool | predicted p95 | measured p95 | three quarters: p95 "
    "| passed | why |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run the experiment, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="workload")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    for option in ("--worker", "--size"):
        parser.add_argument(option, type=int, help=argparse.SUPPRESS)
    for option in ("--url", "--directory"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        workload = WORKLOADS[given.names[0]]
        asyncio.run(work(workload, given.worker, given.url, Path(given.directory), given.size, given.seconds))
        return 0
    from demo_app.stack.servers import Postgres

    print(HEADING)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Postgres(Path(folder) / "postgres") as postgres:
        for name in given.names or WORKLOADS:
            row = experiment(name, postgres.url(driver="asyncpg"), given.seconds)
            failed += "| NO |" in row
            print(row, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
