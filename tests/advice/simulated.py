"""A pool of connections, simulated: first come, first served, exact to the last digit, and the same on every run."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from fastapi_headroom import catalog
from fastapi_headroom.advice.histogram import Histogram
from fastapi_headroom.advice.littles_law import Window
from fastapi_headroom.catalog import Metric

Checkout = tuple[float, float]
"""When it is asked for, and how long it will be held; seconds."""


def run(checkouts: Sequence[Checkout], size: int) -> tuple[list[float], list[int]]:
    """Return how long each checkout waits, and how many it finds in use or waiting when it asks."""
    free = [0.0] * size
    ends: list[float] = []
    waits, found = [], []
    for arrival, hold in checkouts:
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + hold)
        while ends and ends[0] <= arrival:
            heapq.heappop(ends)
        found.append(len(ends))
        heapq.heappush(ends, start + hold)
        waits.append(start - arrival)
    return waits, found


def crowd(
    callers: int, size: int, hold: Callable[[], float], seconds: float
) -> tuple[list[Checkout], list[float], list[int]]:
    """Let a fixed crowd come again as soon as it was served; return checkouts, waits and what was found."""
    free = [0.0] * size
    heapq.heapify(free)
    due = [(number * 0.0001, number) for number in range(callers)]
    ends: list[float] = []
    checkouts, waits, found = [], [], []
    while due[0][0] < seconds:
        arrival, number = heapq.heappop(due)
        start = max(arrival, heapq.heappop(free))
        held = hold()
        heapq.heappush(free, start + held)
        heapq.heappush(due, (start + held, number))
        while ends and ends[0] <= arrival:
            heapq.heappop(ends)
        found.append(len(ends))
        heapq.heappush(ends, start + held)
        checkouts.append((arrival, held))
        waits.append(start - arrival)
    return checkouts, waits, found


def histogram(metric: Metric, values: Sequence[float]) -> Histogram:
    """Return what the store would keep of the values."""
    counts = [0] * (len(metric.buckets) + 1)
    for value in values:
        counts[bisect_left(metric.buckets, value)] += 1
    return Histogram(metric.buckets, counts, sum(values))


def window(checkouts: Sequence[Checkout], waits: Sequence[float], found: Sequence[float], size: int) -> Window:
    """Return what an exporter would have seen of a run."""
    seconds = checkouts[-1][0]
    ended = [hold for (arrival, hold), wait in zip(checkouts, waits, strict=True) if arrival + wait + hold <= seconds]
    ticks = [0] * (int(seconds) + 1)
    for arrival, _ in checkouts:
        ticks[int(arrival)] += 1
    mean = sum(ticks[:-1]) / max(1, len(ticks) - 1)
    dispersion = sum((tick - mean) ** 2 for tick in ticks[:-1]) / max(1, len(ticks) - 1) / mean if mean else 1.0
    return Window(
        seconds=seconds,
        holds=histogram(catalog.POOL_USE, ended),
        waits=histogram(catalog.POOL_WAIT, [w for (a, _), w in zip(checkouts, waits, strict=True) if a + w <= seconds]),
        found=histogram(catalog.POOL_DEMAND, found),
        limit=size,
        dispersion=dispersion,
    )


def p95(waits: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return sorted(waits)[int(0.95 * len(waits))]


def smallest_size(checkouts: Sequence[Checkout], target: float) -> int:
    """Return the smallest size with which no more than one checkout in twenty waits longer than the target."""
    size = 1
    while sum(wait > target for wait in run(checkouts, size)[0]) > 0.05 * len(checkouts):
        size += 1
    return size


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Yield arrivals that know nothing of each other."""
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def steady(rate: float, rng: random.Random) -> Iterator[float]:
    """Yield arrivals like clockwork."""
    at = 0.0
    while True:
        at += 1 / rate
        yield at


def bursts(rate: float, together: int, rng: random.Random) -> Iterator[float]:
    """Yield bursts: so many within a millisecond, at random moments."""
    at = 0.0
    while True:
        at += rng.expovariate(rate / together)
        yield from (at + number * 1e-3 / together for number in range(together))


def take(arrivals: Iterator[float], hold: Callable[[], float], seconds: float) -> list[Checkout]:
    """Return the checkouts of some time."""
    checkouts = []
    for at in arrivals:
        if at > seconds:
            return checkouts
        checkouts.append((at, hold()))
    return checkouts
