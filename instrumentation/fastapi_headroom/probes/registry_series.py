"""Series of metrics that are in no catalog: read as totals since the process began, written as what was added.

A worker's slot goes on from the counts of its last owner, and prometheus_client's values begin at 0 in each
process. So counters, histograms and summaries are written as differences, and gauges as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

from fastapi_headroom.catalog import Kind, Metric, Mode
from fastapi_headroom.store.writer import Counter, Gauge, Histogram, Writer

Labels = tuple[tuple[str, str], ...]
Key = tuple[tuple[object, ...], Labels]
DEFAULT_MODE: Final[Mode] = "livemostrecent"
"""For gauges that declare none: what a single worker shows, and with several the one that changed last."""
_LONG_AGO: Final = 1.0
"""Seconds since 1970, of a value that counts if no other does."""

_reported: dict[Key, list[float]] = {}
"""What this process, or the one that it was forked from, has written of each total: it must not be written twice."""


_handed_over: dict[Key, list[float]] = {}
"""What a process that serves nothing itself had counted when it forked last: its first child reports that."""


class TooManyError(Exception):
    """There is no room for another of the user's series."""


class _Total:
    """A counter, or the cells and the sum of a histogram or a summary."""

    __slots__ = ("_counts", "_indexes", "_last", "handle")

    def __init__(self, handle: Counter | Histogram, indexes: tuple[int, ...], last: list[float], counts: int) -> None:
        self.handle, self._indexes, self._last, self._counts = handle, indexes, last, counts

    def write(self, values: list[float]) -> None:
        """Add what has come since the last time. A count that fell was reset: all of it is new."""
        last = self._last
        if values == last:
            return
        if len(values) != len(last) or any(map(_fell, values[: self._counts], last)):
            last[:] = [0.0] * len(values)
        handle = self.handle
        view = handle.view
        mark = handle.mark if isinstance(handle, Histogram) else None
        for index, value, before in zip(self._indexes, values, last, strict=True):
            if value != before:
                if mark is not None:
                    view[mark] = 1.0  # each time: marks may settle in between
                view[index] += value - before
        last[:] = values


def _fell(value: float, before: float) -> bool:
    return value < before


class _Level:
    """A gauge. ``seen`` is the number of the pass that saw it last."""

    __slots__ = ("_handle", "_last", "_mode", "seen")

    def __init__(self, handle: Gauge, mode: Mode) -> None:
        self._handle, self._mode = handle, mode
        self._last: float | None = None
        self.seen = 0

    def write(self, value: float) -> None:
        """Write a value that has changed: of several workers' the latest change may count, not the latest look.

        A 0 at the first look is what a gauge has that nobody has set, and must not hide what another worker set.
        """
        if value != self._last:
            unset = self._last is None and value == 0.0
            self._last = value
            self._handle.set(value)
            if unset and self._mode.endswith("mostrecent"):
                self._handle.view[self._handle.index + 1] = _LONG_AGO

    def remove(self) -> None:
        """Let it vanish from scrapes as far as its mode allows: a sum loses its part, the latest is nobody's."""
        self._last = None
        if self._mode.endswith("mostrecent"):
            self._handle.view[self._handle.index + 1] = 0.0
        elif self._mode.endswith("sum"):
            self._handle.set(0.0)


class UserSeries:
    """The user's series in one writer, at most ``most`` samples."""

    def __init__(self, writer: Writer, most: int) -> None:
        self._writer, self._left = writer, most
        self._rows: dict[tuple[Any, ...], Metric] = {}
        self._totals: dict[Key, _Total] = {}
        self._levels: dict[int, dict[Key, _Level]] = {}
        self._pass = 0

    def begin(self, owner: int) -> None:
        """Begin to write what one collector has, known by its ``id``."""
        self._pass += 1
        self._levels.setdefault(owner, {})

    def end(self, owner: int) -> None:
        """Remove the gauges that a collector had before and has no more."""
        for level in self._levels[owner].values():
            if level.seen != self._pass:
                level.remove()

    def forget(self, owners: Iterable[int]) -> None:
        """Remove the gauges of all collectors but these. Called before these write: one may have replaced another."""
        for owner in self._levels.keys() - set(owners):
            levels = self._levels.pop(owner)
            self._left += len(levels)
            for level in levels.values():
                level.remove()

    def counter(self, family: str, help_text: str, labels: Labels, value: float) -> None:
        """Write a counter's total."""
        key = _counter_key(family, labels)
        total = self._totals.get(key)
        if total is None:
            self._make_room(1)
            handle = self._writer.counter(self._row(f"{family}_total", "counter", help_text, labels), *_values(labels))
            total = self._add(key, handle, (handle.index,), counts=1)
        total.write([value])

    def histogram(
        self, family: str, help_text: str, labels: Labels, cumulative: Mapping[float, float], total_sum: float
    ) -> None:
        """Write a histogram: counts by upper bound, cumulative, with that of +Inf, and the sum."""
        bounds = sorted(cumulative)
        if not bounds or bounds[-1] != float("inf"):
            return
        key, values = _histogram_key(family, bounds, labels), _histogram_values(bounds, cumulative, total_sum)
        total = self._totals.get(key)
        if total is None:
            self._make_room(len(values) + 1)
            row = self._row(family, "histogram", help_text, labels, tuple(bounds[:-1]))
            handle = self._writer.histogram(row, *_values(labels))
            total = self._add(key, handle, (*handle.cells, handle.index), counts=len(bounds))
        total.write(values)

    def summary(self, family: str, help_text: str, labels: Labels, count: float, total_sum: float) -> None:
        """Write a summary: count and sum. Quantiles of several processes cannot be merged."""
        key = _summary_key(family, labels)
        total = self._totals.get(key)
        if total is None:
            self._make_room(2)
            handle = self._writer.summary(self._row(family, "summary", help_text, labels), *_values(labels))
            total = self._add(key, handle, (*handle.cells, handle.index), counts=1)
        total.write([count, total_sum])

    def gauge(self, owner: int, name: str, help_text: str, labels: Labels, value: float, mode: Mode) -> None:
        """Write a gauge's value."""
        levels = self._levels[owner]
        level = levels.get(((name,), labels))
        if level is None:
            self._make_room(1)
            row = self._row(name, "gauge", help_text, labels, mode=mode)
            level = levels[(name,), labels] = _Level(self._writer.gauge(row, *_values(labels)), mode)
        level.seen = self._pass
        level.write(value)

    def _add(self, key: Key, handle: Counter | Histogram, indexes: tuple[int, ...], counts: int) -> _Total:
        last = _reported.setdefault(key, [0.0] * len(indexes))
        total = self._totals[key] = _Total(handle, indexes, last, counts)
        return total

    def _make_room(self, samples: int) -> None:
        if samples > self._left:
            raise TooManyError
        self._left -= samples

    def _row(
        self,
        name: str,
        kind: Kind,
        help_text: str,
        labels: Labels,
        buckets: tuple[float, ...] = (),
        mode: Mode = DEFAULT_MODE,
    ) -> Metric:
        """Return the row of the contract that a metric would have, the same one for the same metric."""
        names = tuple(name for name, _ in labels)
        key = (name, kind, names, buckets, mode, help_text)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Metric(name, kind, "user", names, help_text, "", buckets, mode)
        return row


class HandedOver(UserSeries):
    """Takes the totals of a process that forks workers and serves nothing, such as gunicorn's master with --preload.

    Every worker inherits what was counted there, those too that replace others. Its first child reports it; to all
    later ones it counts as reported.
    """

    def __init__(self) -> None:
        self._levels = {}
        self._pass = 0

    def counter(self, family: str, help_text: str, labels: Labels, value: float) -> None:
        """Take a counter's total."""
        _handed_over[_counter_key(family, labels)] = [value]

    def histogram(
        self, family: str, help_text: str, labels: Labels, cumulative: Mapping[float, float], total_sum: float
    ) -> None:
        """Take a histogram's counts and sum."""
        bounds = sorted(cumulative)
        if bounds:
            key = _histogram_key(family, bounds, labels)
            _handed_over[key] = _histogram_values(bounds, cumulative, total_sum)

    def summary(self, family: str, help_text: str, labels: Labels, count: float, total_sum: float) -> None:
        """Take a summary's count and sum."""
        _handed_over[_summary_key(family, labels)] = [count, total_sum]

    def gauge(self, owner: int, name: str, help_text: str, labels: Labels, value: float, mode: Mode) -> None:
        """Leave a gauge alone: every worker has its own."""


def inherit() -> None:
    """Take note, in a forked child, of what an earlier child of the same parent reports."""
    for key, values in _handed_over.items():
        _reported.setdefault(key, list(values))
    _handed_over.clear()


def _counter_key(family: str, labels: Labels) -> Key:
    return ("counter", family), labels


def _summary_key(family: str, labels: Labels) -> Key:
    return ("summary", family), labels


def _histogram_key(family: str, bounds: Iterable[float], labels: Labels) -> Key:
    return ("histogram", family, *bounds), labels


def _histogram_values(bounds: Iterable[float], cumulative: Mapping[float, float], total_sum: float) -> list[float]:
    """Return the count of each bucket alone, and the sum."""
    counts = [cumulative[bound] for bound in bounds]
    return [counts[0], *(count - below for below, count in pairwise(counts)), total_sum]


def _values(labels: Labels) -> tuple[str, ...]:
    return tuple(value for _, value in labels)
