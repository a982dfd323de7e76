"""What a worker needs for an app of 60 routes, all of them used, with about 10,000 samples, beside the bare app.

Both serve the same requests before they are measured. The process's memory is its resident set, which includes the
pages of the store that it has mapped; what is on disk (in memory where the system has ``/dev/shm``) are the blocks
that the store's sparse files occupy. The column "peer" is the bare app. Of several workers one exports, where no
sidecar does: it also keeps what it has read and sent, which the last line says, after two scrapes in either format.
"""

from __future__ import annotations

import statistics
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks import serving
from benchmarks.apps import METHODS
from benchmarks.measuring import Row, main
from fastapi_headroom.store.reader import Reader

ROUTES = 58
"""Besides the two that every app has."""
REQUESTS = 3_000


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield both budgets, and how many samples there were."""
    bare, ours, disk, samples, exporting = [], [], [], [], []
    for _ in range(1 if quick else 3):
        with serving.server("bare", routes=ROUTES) as running:
            exercise(running)
            bare.append(running.memory())
        with serving.server("headroom", routes=ROUTES) as running:
            exercise(running)
            ours.append(running.memory())
            disk.append(occupied(running.store))
            reader = Reader(running.store)
            samples.append(sum(map(len, reader.read().families)))
            reader.close()
            scrape(running)
            exporting.append(running.memory())
    more = statistics.median(b - a for a, b in zip(bare, ours, strict=True))
    yield Row("samples of the worker", "", statistics.median(samples))
    yield Row("on disk", "MiB", statistics.median(disk), budget=4.0)
    yield Row("in the process: added, and bare", "MiB", more, statistics.median(bare), budget=12.0)
    scraped = statistics.median(b - a for a, b in zip(bare, exporting, strict=True))
    yield Row("the same of the one worker that exports", "MiB", scraped)


def exercise(running: serving.Server) -> None:
    """Call every route by every method, so that all series exist, and do some work."""
    for number in range(ROUTES):
        for method in METHODS:
            running.get(f"/other/{number}/x", method)
    for number in range(REQUESTS):
        running.get(f"/other/{number % ROUTES}/x" if number % 3 else "/items/7")
    running.get("/items/none")  # 422
    running.get("/nowhere")  # 404
    running.get("/ping")


def scrape(running: serving.Server) -> None:
    """Scrape the worker's exporter as a Prometheus does that knows OpenMetrics, and as one that does not."""
    for accept in ("application/openmetrics-text; version=1.0.0", "text/plain") * 2:
        headers = {"Accept": accept, "Accept-Encoding": "gzip"}
        with urllib.request.urlopen(urllib.request.Request(running.exporter(), headers=headers)) as response:
            assert len(response.read()) > 10_000


def occupied(folder: Path) -> float:
    """Return the MiB that a folder's files occupy."""
    return sum(file.stat().st_blocks for file in folder.iterdir()) * 512 / 2**20


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
