"""What can be said of observations of which only buckets and the sum were kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import expm1


class Histogram:
    """Counts by upper bound (one more than there are bounds: the last is without), and the sum of what was observed."""

    __slots__ = ("_numbers", "bounds", "count", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[float], total: float) -> None:
        self.bounds, self.counts, self.total = tuple(bounds), tuple(counts), total
        self.count = sum(self.counts)
        self._numbers: Sequence[tuple[int, float]] | None = None

    @property
    def mean(self) -> float:
        """The mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def variation(self) -> float:
        """Return the squared coefficient of variation: 0 if all are the same, 1 for exponential times.

        Within their buckets observations are spread in the least committed way that has the mean which is known:
        density falls or rises exponentially, at one rate for all buckets (the distribution of maximum entropy).
        """
        if not self.count or self.total <= 0:
            return 0.0
        low, high = -1e6, 1e6
        for _ in range(60):
            rate = (low + high) / 2
            low, high = (rate, high) if self._moments(rate)[0] > self.mean else (low, rate)
        first, second = self._moments((low + high) / 2)
        return max(0.0, second / first**2 - 1.0) if first > 0 else 0.0

    def spread(self) -> float:
        """Return variance over mean of whole numbers; 0 of nothing."""
        if not self.count or self.total <= 0:
            return 0.0
        first = second = 0.0
        for number, share in self.whole_numbers():
            first += share * number
            second += share * number * number
        return max(0.0, second / first - first) if first > 0 else 0.0

    def share_above(self, value: float) -> float:
        """Return the share of observations above a value, exact at the bounds."""
        if not self.count:
            return 0.0
        above = 0.0
        for low, high, count in self._cells():
            if value <= low:
                above += count
            elif value < high:
                above += count * (high - value) / (high - low)
        return above / self.count

    def whole_numbers(self) -> Sequence[tuple[int, float]]:
        """Return every whole number that was observed with its share, rising; a wide bucket's are spread evenly."""
        if self._numbers is None:
            self._numbers = tuple(self._spread_out())
        return self._numbers

    def _spread_out(self) -> Iterator[tuple[int, float]]:
        for low, high, count in self._cells():
            first, last = (0, 0) if high <= 0 else (int(low) + 1, int(high))
            if low <= 0 and self.bounds[0] > 0:
                first = 0
            for number in range(first, last + 1):
                yield number, count / self.count / (last - first + 1)

    def highest(self) -> float | None:
        """Return the upper bound of the highest bucket in use; the highest bound there is if it was exceeded."""
        used = [number for number, count in enumerate(self.counts) if count]
        return self.bounds[min(used[-1], len(self.bounds) - 1)] if used else None

    def _moments(self, rate: float) -> tuple[float, float]:
        """Return the means of the observations and of their squares where density falls at ``rate`` in each bucket."""
        first = second = 0.0
        for low, high, count in self._cells():
            share = count / self.count
            mean, square = _falling(high - low, rate)
            first += share * (low + mean)
            second += share * (low * low + 2 * low * mean + square)
        return first, second

    def _cells(self) -> Iterator[tuple[float, float, float]]:
        """Yield lower bound, upper bound and count of the buckets in use; the last one is taken twice as wide."""
        low = 0.0
        for bound, count in zip((*self.bounds, 2 * self.bounds[-1]), self.counts, strict=True):
            if count:
                yield low, bound, count
            low = bound


def _falling(width: float, rate: float) -> tuple[float, float]:
    """Return the means of x and of x squared where x has a density like exp(-rate * x) from 0 to ``width``."""
    steep = rate * width
    if abs(steep) < 1e-3:
        return width / 2 - steep * width / 12, width * width / 3
    if steep > 50:
        return 1 / rate, 2 / rate**2
    if steep < -50:
        return width + 1 / rate, width * width + 2 * width / rate + 2 / rate**2
    rest = width / expm1(steep)
    mean = 1 / rate - rest
    return mean, 2 * mean / rate - width * rest
