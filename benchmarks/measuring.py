"""What every benchmark shares: how CPU time is compared, and the row in which a figure is reported.

A machine's speed changes by up to a factor of two within tens of milliseconds, so figures of two runs cannot be
compared, and neither can two halves of one run. What is compared is measured in turns, in short adjacent slices and
in both orders (A B B A), and a figure is the median of what the turns gave.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the table: ours, a peer's, how many times ours the peer's is, and what was promised."""

    what: str
    unit: str
    here: float | None
    """With fastapi-headroom; None in a row that describes something else."""
    peer: float | None = None
    ratio: float | None = None
    more_than: bool = False
    """The ratio is a lower bound: ours is within the noise."""
    budget: float | None = None
    """What ``here`` may be at most."""
    least: float | None = None
    """What ``ratio`` must be at least."""

    @property
    def met(self) -> bool | None:
        """Whether every promise is kept; None when there is none."""
        kept = []
        if self.budget is not None and self.here is not None:
            kept.append(self.here <= self.budget)
        if self.least is not None and self.ratio is not None:
            kept.append(self.ratio >= self.least)
        return all(kept) if kept else None


Benchmark = Callable[[bool], Iterator[Row]]


def main(benchmark: Benchmark, description: str) -> int:
    """Run one benchmark by itself: print its rows, or leave them in the file that ``python -m benchmarks`` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short rounds: shows that it runs, no more")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = list(benchmark(arguments.quick))
    if arguments.rows:
        arguments.rows.write_text(json.dumps([asdict(row) for row in rows]))
    else:
        from benchmarks.report import as_text

        sys.stdout.write(as_text(rows))
    return 0


def compare(ours: Work, peer: Work, rounds: int) -> tuple[float, float, float]:
    """Return the CPU seconds of both, and how many times ours the peer's are: medians of rounds A B B A."""
    here, there = [], []
    for _ in range(rounds):
        first, second = cpu(ours), cpu(peer)
        second += cpu(peer)
        first += cpu(ours)
        here.append(first / 2)
        there.append(second / 2)
    ratio = statistics.median(b / a for a, b in zip(here, there, strict=True))
    return statistics.median(here), statistics.median(there), ratio


def added(call: Work, attach: Work, detach: Work, rounds: int, count: int = 1_000) -> tuple[float, float]:
    """Return what a call costs alone and what it costs more between ``attach`` and ``detach``, in microseconds."""
    alone, more = [], []
    for _ in range(rounds):
        before = cpu(call, count)
        attach()
        measured = (cpu(call, count) + cpu(call, count)) / 2
        detach()
        base = (before + cpu(call, count)) / 2
        alone.append(base * 1e6)
        more.append((measured - base) * 1e6)
    return statistics.median(alone), statistics.median(more)


def cpu(work: Work, count: int = 1) -> float:
    """Return the CPU seconds of one call, as the mean of ``count`` calls."""
    started = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - started) / count


def times(peer: float, here: float, noise: float) -> tuple[float, bool]:
    """Return how many times ours the peer's is, and whether that is a lower bound because ours is within the noise."""
    return peer / max(here, noise), here < noise
