"""The experiment of docs/pool-autosize.md: a load that steps 1x, 6x, 1x, on pools of fixed size and on a live one.

python -m benchmarks.bench_autosize [--seconds 45] [--sizes 4,12,16] [--picture FILE.png] [--data FILE.json]

Two worker processes share a real PostgreSQL. Requests arrive by chance and do not wait for each other: each takes a
connection, has the server sleep for 500 ms and count a table. The arrivals are the same for each pool, and all pools
run side by side, so that what else the machine does hits all of them. What counts of a phase is its second half:
throughput, and the 95th percentile of the time from asking for a connection to the answer; of the whole run, the
connections that lay idle on average. Passed: autosize is within 10 % of the best fixed size of each phase (the one
with the lowest p95) in both, with fewer idle connections than the largest.

The picture needs matplotlib, which the project does not: ``pip install matplotlib``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

WORKERS: Final = 2
RATE: Final = 2.5
"""Requests per second of one worker at 1x."""
FACTORS: Final = (1, 6, 1)
HOLD: Final = 0.5
MINIMUM: Final = 2
MAXIMUM: Final = 16
BUDGET: Final = 28
"""For both workers; each could have MAXIMUM, but not both."""
SIZES: Final = (4, 12, 16)
SECONDS: Final = 45.0
PATIENCE: Final = 15.0
LATITUDE: Final = 0.10
LOOK: Final = 0.25
"""Seconds between two looks at the pool."""


def plan(worker: int, seconds: float) -> list[float]:
    """Return when a worker's requests arrive: the same on every run."""
    rng = random.Random(worker)
    arrivals, at = [], 0.0
    while at < seconds * len(FACTORS):
        at += rng.expovariate(RATE * FACTORS[min(int(at / seconds), len(FACTORS) - 1)])
        arrivals.append(at)
    return arrivals[:-1]


async def work(worker: int, url: str, directory: Path, size: int, seconds: float) -> None:
    """Run one worker: a pool of a size, or one that follows its load if that is 0; print what was seen."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    import fastapi_headroom as headroom

    engine = create_async_engine(url, pool_size=size or MINIMUM, max_overflow=0, pool_timeout=60)
    if not size:
        headroom.autosize(engine, MINIMUM, MAXIMUM, BUDGET, workers=WORKERS, patience=PATIENCE)
    handle = headroom.init_worker(pools={"primary": engine}, directory=directory, exporter=False, tracing=False)
    opened = [await engine.connect() for _ in range(size or MINIMUM)]
    for connection in opened:
        await connection.execute(text("SELECT 1"))
        await connection.close()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    statement = text("SELECT count(*), pg_sleep(:seconds) FROM pg_class")
    requests: list[tuple[float, float]] = []
    looks: list[tuple[float, int, int, int, int]] = []
    began = time.perf_counter()

    async def request() -> None:
        asked = time.perf_counter()
        async with engine.connect() as connection:
            await connection.execute(statement, {"seconds": HOLD})
        ended = time.perf_counter()
        requests.append((ended - began, ended - asked))

    async def look() -> None:
        pool: Any = engine.sync_engine.pool
        while True:
            state: Any = vars(pool)["_fastapi_headroom"]
            used, limit = len(state.held), pool.size() + pool._max_overflow
            looks.append((time.perf_counter() - began, limit, used, pool.checkedin(), len(state.waiting)))
            await asyncio.sleep(LOOK)

    looker = asyncio.create_task(look())
    async with asyncio.TaskGroup() as group:
        for at in plan(worker, seconds):
            if (ahead := began + at - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            group.create_task(request())
    looker.cancel()
    print("done " + json.dumps({"requests": requests, "looks": looks}), flush=True)
    handle.shutdown()
    await engine.dispose()


def run(url: str, sizes: Sequence[int], seconds: float, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Run both workers at all sizes (0: autosize) side by side; return what each saw."""
    processes = {}
    for size in sizes:
        for worker in range(WORKERS):
            (folder / str(size)).mkdir(exist_ok=True)
            processes[size, worker] = subprocess.Popen(
                [
                    sys.executable, "-m", "benchmarks.bench_autosize", "--worker", str(worker), "--url", url,
                    "--directory", str(folder / str(size)), "--size", str(size), "--seconds", str(seconds),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
    for process in processes.values():
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    with ThreadPoolExecutor(len(processes)) as readers:
        outputs = dict(zip(processes, readers.map(lambda it: it.communicate()[0], processes.values()), strict=True))
    for (size, _), output in outputs.items():
        found[size] += [json.loads(line.removeprefix("done ")) for line in output.splitlines() if line[:5] == "done "]
    if any(len(workers) < WORKERS for workers in found.values()):
        raise RuntimeError("a worker of the experiment failed")
    return found


def phases(found: list[dict[str, Any]], seconds: float) -> list[tuple[float, float]]:
    """Return throughput and p95 in seconds of the second half of each phase, over both workers."""
    result = []
    for phase in range(len(FACTORS)):
        begin, end = (phase + 0.5) * seconds, (phase + 1) * seconds
        times = sorted(took for worker in found for at, took in worker["requests"] if begin <= at < end)
        result.append((len(times) / (end - begin), times[int(0.95 * len(times))]))
    return result


def idle(found: list[dict[str, Any]]) -> float:
    """Return the connections that lay idle on average over the run, of both workers together."""
    return sum(sum(look[3] for look in worker["looks"]) / len(worker["looks"]) for worker in found)


def judge(fixed: dict[int, list[dict[str, Any]]], followed: list[dict[str, Any]], seconds: float) -> tuple[str, bool]:
    """Return the table in Markdown, and whether autosize passed."""
    heads = [f"{factor}x: requests/s, p95" for factor in FACTORS]
    lines = ["| size per worker | " + " | ".join(heads) + " | idle on average |", "|---|" + "---|" * (len(heads) + 1)]
    measured = {size: phases(found, seconds) for size, found in fixed.items()}
    ours = phases(followed, seconds)
    for name, cells, found in [
        *((str(size), measured[size], fixed[size]) for size in fixed),
        (f"**autosize {MINIMUM} to {MAXIMUM}, budget {BUDGET}**", ours, followed),
    ]:
        texts = [f"{rate:.1f}, {p95 * 1e3:.0f} ms" for rate, p95 in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + f" | {idle(found):.1f} |")
    texts, passed = [], idle(followed) < idle(fixed[max(fixed)])
    for phase, (rate, p95) in enumerate(ours):
        best_rate, best_p95 = min((cells[phase] for cells in measured.values()), key=lambda cell: cell[1])
        texts.append(f"{rate / best_rate - 1:+.1%}, {p95 / best_p95 - 1:+.1%}")
        passed = passed and rate >= best_rate * (1 - LATITUDE) and p95 <= best_p95 * (1 + LATITUDE)
    share = idle(followed) / idle(fixed[max(fixed)]) - 1
    lines.append("| autosize against the best | " + " | ".join(texts) + f" | {share:+.0%} against {max(fixed)} |")
    return "\n".join(lines), passed


def draw(followed: list[dict[str, Any]], seconds: float, file: Path) -> None:
    """Draw the run of autosize: limit, use and waiting per worker, and the p95."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        WORKERS + 1, 1, sharex=True, figsize=(11, 8), height_ratios=[2, 2, 1.4], layout="constrained"
    )
    for number, worker in enumerate(followed):
        at, limit, used, ready, waiting = zip(*worker["looks"], strict=True)
        row = rows[number]
        row.stackplot(at, used, ready, labels=["in use", "idle"], colors=["#5794F2", "#C8D6EE"], step="post")
        row.step(at, limit, where="post", color="#E02F44", linewidth=1.8, label="limit")
        row.step(at, waiting, where="post", color="#FF9830", linewidth=1.2, label="waiting")
        row.axhline(MINIMUM, color="grey", linestyle=":", linewidth=1)
        row.axhline(MAXIMUM, color="grey", linestyle=":", linewidth=1)
        row.set_ylabel(f"worker {number}: connections")
        row.set_ylim(0, MAXIMUM + 6)
    rows[0].legend(loc="upper right", ncols=4)
    ends = [begin * 2.0 for begin in range(1, int(seconds * len(FACTORS) / 2) + 1)]
    p95 = []
    for end in ends:
        times = sorted(took for worker in followed for at, took in worker["requests"] if end - 2 <= at < end)
        p95.append(times[int(0.95 * len(times))] * 1e3 if times else float("nan"))
    rows[-1].step(ends, p95, where="pre", color="#8F3BB8")
    rows[-1].set_ylabel("p95, ms")
    rows[-1].set_yscale("log")
    rows[-1].set_xlabel("seconds")
    for row in rows:
        for phase in range(1, len(FACTORS)):
            row.axvline(phase * seconds, color="black", linewidth=0.8, linestyle="--")
    load = " -> ".join(f"{factor}x" for factor in FACTORS)
    rows[0].set_title(f"Load {load} on two workers, limits {MINIMUM} to {MAXIMUM} (dotted), budget {BUDGET}")
    figure.savefig(file, dpi=100)


def main() -> int:
    """Run the experiment, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of one phase")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--data", type=Path, help="where to keep what was seen, to draw it again")
    for option in ("--worker", "--size"):
        parser.add_argument(option, type=int, help=argparse.SUPPRESS)
    for option in ("--url", "--directory"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        asyncio.run(work(given.worker, given.url, Path(given.directory), given.size, given.seconds))
        return 0
    from demo_app.stack.servers import Postgres

    sizes = [int(size) for size in given.sizes.split(",")]
    with (
        tempfile.TemporaryDirectory() as folder,
        Postgres(Path(folder) / "postgres", max_connections=BUDGET + WORKERS * sum(sizes) + 10) as postgres,
    ):
        fixed = run(postgres.url(driver="asyncpg"), [0, *sizes], given.seconds, Path(folder))
    followed = fixed.pop(0)
    if given.data:
        given.data.write_text(json.dumps(followed))
    if given.picture:
        draw(followed, given.seconds, given.picture)
    table, passed = judge(fixed, followed, given.seconds)
    print(table)
    print("passed" if passed else "NOT passed")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
