"""An observation and a scrape, beside prometheus_client over the very same files, in CPU time.

Scrapes are from directory to text: our reader and exposition, prometheus_client's ``MultiProcessCollector`` and
``generate_latest``. *Warm* is not the first one. The samples are of the request probe's families. Before a scrape,
worker after worker observes a request on every tenth of its routes, in all slots where nothing else is said, and does
what it does once a second anyway. *Every series* means that nothing at all is as it was.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, values
from prometheus_client import Histogram as PeerHistogram
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from benchmarks.measuring import Row, Work, compare, cpu, main
from fastapi_headroom import catalog
from fastapi_headroom.exporter.exposition import Renderer
from fastapi_headroom.store import exemplars as exemplars_of
from fastapi_headroom.store.exemplars import ExemplarReader
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer

LABELS = ("GET", "/orders/{order_id}", "200", "")
BOUNDS = catalog.REQUEST_DURATION.buckets
Observe = Callable[[float], None]
BUDGETS = {2_000: 15.0, 10_000: 75.0}
"""Milliseconds of a warm scrape of 64 slots, by samples per slot."""


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield observations, scrapes beside the peer, and how scrapes grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # 256 slots are held by this one process
    yield from observations(rounds=3 if quick else 15, count=10_000 if quick else 50_000)
    for samples, rounds in ((2_000, 5), (10_000, 3)):
        if not quick or samples == 2_000:
            yield from scrapes(slots=8 if quick else 64, samples=samples, rounds=1 if quick else rounds)
    yield from growth((1, 4) if quick else (1, 4, 16, 64, 256), rounds=3 if quick else 15)
    for samples in (2_000, 10_000):
        yield from changes(slots=8 if quick else 64, samples=samples, rounds=3 if quick else 15)
    yield from openmetrics(slots=8 if quick else 64, exemplars=300, rounds=3 if quick else 15)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------ observations
def observations(*, rounds: int, count: int) -> Iterator[Row]:
    """Compare one histogram observation with prometheus_client's, in process and in multiprocess mode."""
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        writer = Writer.open(Path(folder) / "ours")
        ours = writer.histogram(catalog.REQUEST_DURATION, *LABELS).observe
        shared = peer_histogram(Path(folder))
        peers: list[tuple[str, Observe, float | None]] = [
            ("one process", peer_histogram(None).labels(*LABELS).observe, None),
            ("multiprocess", shared.labels(*LABELS).observe, None),
            ("multiprocess with .labels()", lambda seconds: shared.labels(*LABELS).observe(seconds), 10.0),
        ]
        for name, peer, least in peers:
            here, there, ratio = compare(_repeat(ours, count), _repeat(peer, count), rounds)
            what = f"observation, and prometheus_client's, {name}"
            yield Row(what, "us", here / count * 1e6, there / count * 1e6, ratio, least=least)
        writer.close()


def peer_histogram(folder: Path | None) -> PeerHistogram:
    """Return prometheus_client's histogram of the same bounds, multiprocess when a folder is given."""
    before = values.ValueClass
    try:
        if folder is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
            values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
        histogram = PeerHistogram(
            "peer_seconds", "A.", ("a", "b", "c", "d"), registry=CollectorRegistry(), buckets=BOUNDS
        )
        histogram.labels(*LABELS).observe(0.042)
    finally:
        values.ValueClass = before
    return histogram


def _repeat(observe: Observe, count: int) -> Work:
    def work() -> None:
        for _ in range(count):
            observe(0.042)

    return work


# ----------------------------------------------------------------------- scrapes
class Store:
    """A directory with so many slots, each with about so many samples, and what scrapes it."""

    def __init__(self, directory: Path, slots: int, samples: int) -> None:
        self.directory = directory
        self.writers = [Writer.open(directory) for _ in range(slots)]
        self.observers = [fill(writer, samples, number) for number, writer in enumerate(self.writers)]
        self.reader, self.renderer = Reader(directory), Renderer()
        self.scrape()
        self.samples = sum(map(len, self.reader.read().families))

    def scrape(self) -> bytes:
        """Return the exposition."""
        return self.renderer.render(self.reader.read().families)

    def observe(self, slots: int, *, every: int = 10) -> None:
        """Let so many workers serve requests on a tenth of their routes, or on more of them."""
        for observers in self.observers[:slots]:
            for write in observers[::every]:
                write(0.0123)
        for writer in self.writers:
            writer.tend()

    def milliseconds(self, changed: int, rounds: int, *, every: int = 10) -> float:
        """Return the median of warm scrapes, after so many slots have changed."""
        figures = []
        for _ in range(2):  # the marks of a file are known from its second read on
            self.observe(0)
            self.scrape()
        for _ in range(rounds):
            self.observe(changed, every=every)
            figures.append(cpu(self.scrape) * 1e3)
        return statistics.median(figures)

    def close(self) -> None:
        """Let go of everything."""
        self.reader.close()
        for writer in self.writers:
            writer.close()


@contextlib.contextmanager
def store(slots: int, samples: int) -> Iterator[Store]:
    """Make a store in memory, where there is such a file system."""
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        made = Store(Path(folder) / "store", slots, samples)
        try:
            yield made
        finally:
            made.close()


def fill(writer: Writer, samples: int, seed: int) -> Sequence[Observe]:
    """Make about that many samples, in an order of the worker's own, as traffic does; return what observes them."""
    by_route = (catalog.REQUEST_LATENCY, catalog.TIME_TO_FIRST_BYTE, catalog.LOOP_HOLD, catalog.REQUEST_QUERIES)
    per_route = sum(len(metric.buckets) + 3 for metric in (catalog.REQUEST_DURATION, *by_route)) + 5
    routes = samples // per_route
    observers: list[Observe] = []
    for number in range(routes):
        route = f"/resource/{(number + seed) % routes}/items/{{item_id}}"
        handles: list[Observe] = [writer.histogram(catalog.REQUEST_DURATION, "GET", route, "200", "").observe]
        handles += [writer.histogram(metric, route).observe for metric in by_route]
        handles += [writer.counter(catalog.REQUEST_STAGE, route, stage).inc for stage in ("on_loop", "db", "other")]
        handles += [writer.counter(catalog.REQUESTS, route, outcome).inc for outcome in ("ok", "error")]
        for write in handles:
            write(0.01 * number)

        def observe(value: float, handles: Sequence[Observe] = tuple(handles)) -> None:
            for write in handles:
                write(value)

        observers.append(observe)
    return observers


def scrapes(*, slots: int, samples: int, rounds: int) -> Iterator[Row]:
    """Compare a warm scrape with prometheus_client's."""
    with store(slots, samples) as made:
        registry = CollectorRegistry()
        registry.register(MultiProcessCollector(None, str(made.directory)))  # type: ignore[no-untyped-call]

        here, there, ratios = [], [], []
        for _ in range(rounds):
            made.observe(slots)
            first = cpu(made.scrape)
            second = cpu(lambda: generate_latest(registry))
            made.observe(slots)
            first += cpu(made.scrape)
            here.append(first / 2 * 1e3)
            there.append(second * 1e3)
            ratios.append(second / (first / 2))
        yield Row(
            f"warm scrape, {slots} slots x {made.samples:,} samples, and prometheus_client's",
            "ms", statistics.median(here), statistics.median(there), statistics.median(ratios),
            budget=BUDGETS[samples] if slots == 64 else None, least=20.0,
        )  # fmt: skip


def growth(counts: Sequence[int], rounds: int) -> Iterator[Row]:
    """Show the time of a warm scrape by the number of slots."""
    for slots in counts:
        with store(slots, 2_000) as made:
            yield Row(
                f"warm scrape, {slots} slot{'s' * (slots > 1)} x {made.samples:,} samples",
                "ms", made.milliseconds(slots, rounds),
            )  # fmt: skip


def changes(slots: int, samples: int, rounds: int) -> Iterator[Row]:
    """Show the time of a warm scrape by what has changed since the one before."""
    with store(slots, samples) as made:
        for changed in (0, 1, slots // 4, slots):
            share = {0: "nothing", 1: "1 slot", slots: "all slots"}.get(changed, f"{changed} slots")
            yield Row(
                f"warm scrape, {slots} slots x {made.samples:,} samples, {share} changed",
                "ms", made.milliseconds(changed, rounds),
            )  # fmt: skip
        yield Row(
            f"warm scrape, {slots} slots x {made.samples:,} samples, every series changed",
            "ms", made.milliseconds(slots, rounds, every=1),
        )  # fmt: skip


def openmetrics(slots: int, exemplars: int, rounds: int) -> Iterator[Row]:
    """Show the time of a warm scrape with exemplars by how many are new since the one before."""
    with store(slots, 2_000) as made, _no_interval():
        reader, bounds = ExemplarReader(made.directory), catalog.REQUEST_LATENCY.buckets
        places = [(f"/traced/{number // len(bounds)}", bounds[number % len(bounds)]) for number in range(exemplars)]

        def trace(writers: Sequence[Writer]) -> None:
            for writer in writers:
                for number, (route, value) in enumerate(places):
                    histogram = writer.histogram(catalog.REQUEST_LATENCY, route)
                    histogram.observe(value)
                    writer.exemplar(histogram, value, number + 1, number + 1)
            made.observe(0)

        def scrape() -> None:
            families = made.reader.read().families
            made.renderer.render(families, openmetrics=True, exemplars=reader.read())

        trace(made.writers)
        for _ in range(3):
            scrape()
            made.observe(0)
        for changed, share in ((0, "none"), (1, "those of 1 slot"), (slots, "all")):
            figures = []
            for _ in range(rounds):
                trace(made.writers[:changed])
                figures.append(cpu(scrape) * 1e3)
            yield Row(
                f"OpenMetrics, {slots} slots x {made.samples:,} samples and {exemplars} exemplars, {share} new",
                "ms", statistics.median(figures),
            )  # fmt: skip


@contextlib.contextmanager
def _no_interval() -> Iterator[None]:
    """Let each observation leave an exemplar, as one a second and bucket does."""
    before, exemplars_of.INTERVAL = exemplars_of.INTERVAL, 0.0
    try:
        yield
    finally:
        exemplars_of.INTERVAL = before


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
