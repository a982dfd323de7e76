"""What an observation and a scrape of the store cost, as ratios to prometheus_client in one run.

    python benchmarks/bench_store.py [--quick]

Both sides run in this process, in turns, so that a machine whose speed wanders cannot favour one of them. Costs are
CPU time; each figure is the median of the rounds, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "instrumentation"))

from prometheus_client import CollectorRegistry, values
from prometheus_client import Histogram as PeerHistogram
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from fastapi_headroom import catalog
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer

ROUTE = "/orders/{order_id}"
LABELS = ("GET", ROUTE, "200", "")
BOUNDS = catalog.REQUEST_DURATION.buckets
Work = Callable[[], object]


def main(arguments: list[str] | None = None) -> int:
    """Run both comparisons and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller directories")
    quick = parser.parse_args(arguments).quick
    rows = observations(rounds=5 if quick else 21, count=20_000 if quick else 100_000)
    rows += scrapes(slots=8 if quick else 64, samples=2_000, rounds=3 if quick else 9)
    print(f"{'what':<58}{'here':>12}{'peer':>12}{'ratio':>8}")
    for what, unit, ours, peer, ratio in rows:
        print(f"{what:<58}{ours:>9.2f} {unit}{peer:>9.2f} {unit}{ratio:>7.1f}x")
    return 0


Row = tuple[str, str, float, float, float]


def observations(*, rounds: int, count: int) -> list[Row]:
    """Compare one histogram observation with prometheus_client's, in process and in multiprocess mode."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer.open(Path(folder) / "ours")
        ours = writer.histogram(catalog.REQUEST_DURATION, *LABELS).observe
        in_process, _ = peer_histogram(None)
        shared, _ = peer_histogram(Path(folder))
        resolved = shared.labels(*LABELS).observe
        peers: list[tuple[str, Callable[[float], object]]] = [
            ("one process", in_process.labels(*LABELS).observe),
            ("multiprocess", resolved),
            ("multiprocess with .labels()", lambda seconds: shared.labels(*LABELS).observe(seconds)),
        ]
        rows = []
        for name, peer in peers:
            here, there, ratio = compare(repeat(ours, count), repeat(peer, count), rounds)
            rows.append(
                (f"observation, prometheus_client {name}", "us", here / count * 1e6, there / count * 1e6, ratio)
            )
        writer.close()
    return rows


def repeat(observe: Callable[[float], object], count: int) -> Work:
    """Return work that makes ``count`` observations."""

    def work() -> None:
        for _ in range(count):
            observe(0.042)

    return work


def peer_histogram(folder: Path | None) -> tuple[PeerHistogram, CollectorRegistry]:
    """Return prometheus_client's histogram of the same bounds, multiprocess when a folder is given."""
    before = values.ValueClass
    registry = CollectorRegistry()
    try:
        if folder is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
            import prometheus_client.metrics as metrics

            metrics.values.ValueClass = values.MultiProcessValue()
        histogram = PeerHistogram("peer_seconds", "A peer.", ("a", "b", "c", "d"), registry=registry, buckets=BOUNDS)
        histogram.labels(*LABELS).observe(0.042)
    finally:
        values.ValueClass = before
    return histogram, registry


def scrapes(*, slots: int, samples: int, rounds: int) -> list[Row]:
    """Compare a warm read of many slots with prometheus_client's, over the very same files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        directory = Path(folder) / "store"
        writers = [Writer.open(directory) for _ in range(slots)]
        for number, writer in enumerate(writers):
            fill(writer, samples, number)
        reader, collector = Reader(directory), MultiProcessCollector(None, str(directory))
        registry = CollectorRegistry()
        registry.register(collector)
        reader.read()
        handle = writers[0].histogram(catalog.REQUEST_DURATION, *LABELS)

        def read() -> object:
            handle.observe(0.1)  # never twice the same numbers
            return reader.read()

        rows = []
        for what, peer in (("read", collector.collect), ("read, peer's with text", lambda: generate_latest(registry))):
            here, there, ratio = compare(read, peer, rounds)
            rows.append((f"{what}, {slots} slots x {samples:,} samples", "ms", here * 1e3, there * 1e3, ratio))
        reader.close()
        for writer in writers:
            writer.close()
    return rows


def fill(writer: Writer, samples: int, seed: int) -> None:
    """Make about that many samples, in an order of the worker's own, as traffic does."""
    series = samples // (len(BOUNDS) + 3)
    for number in range(series):
        route = f"/resource/{(number + seed) % series}/items/{{item_id}}"
        writer.histogram(catalog.REQUEST_DURATION, "GET", route, "200", "").observe(0.01 * number)


def compare(ours: Work, peer: Work, rounds: int) -> tuple[float, float, float]:
    """Return the medians of both sides' CPU seconds and of their ratio; rounds run A B B A."""
    ours_times, peer_times = [], []
    for turn in range(rounds):
        order = (ours, peer) if turn % 2 == 0 else (peer, ours)
        spent = {}
        for work in order:
            began = time.process_time()
            work()
            spent[work] = time.process_time() - began
        ours_times.append(spent[ours])
        peer_times.append(spent[peer])
    ratio = statistics.median(there / here for here, there in zip(ours_times, peer_times, strict=True))
    return statistics.median(ours_times), statistics.median(peer_times), ratio


if __name__ == "__main__":
    raise SystemExit(main())
