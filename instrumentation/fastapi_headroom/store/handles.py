"""The handles that probes write through: a memory view and integer indexes, nothing else.

Under the GIL ``view[i] += x`` is one uninterrupted step (the interpreter switches threads only at calls
and backward jumps), so no increment is lost. A build without the GIL takes a lock: see ``classes``.
"""

from __future__ import annotations

import sys
import threading
import time
from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext


class Moves:
    """How often handles were sent elsewhere: who remembers a handle's view and indexes asks them anew then."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0
        """Raised after handles were sent elsewhere, and before their old values are looked at."""


MOVES = Moves()


class Handle:
    """One series. ``view`` is swapped when its file is left, the indexes stay valid."""

    __slots__ = ("index", "view")

    def __init__(self, view: memoryview[float], index: int) -> None:
        self.view = view
        self.index = index


class Counter(Handle):
    """A total that only rises."""

    __slots__ = ()

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount, which must not be negative."""
        self.view[self.index] += amount


class Gauge(Handle):
    """A value that rises and falls."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Replace the value."""
        self.view[self.index] = value

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount."""
        self.view[self.index] += amount

    def dec(self, amount: float = 1.0) -> None:
        """Take an amount off."""
        self.view[self.index] -= amount


class RecentGauge(Gauge):
    """A gauge of which the latest write of all workers counts: it keeps the time of the write beside the value."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Replace the value and note the time."""
        now = time.time()
        self.view[self.index] = value
        self.view[self.index + 1] = now

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount and note the time."""
        now = time.time()
        self.view[self.index] += amount
        self.view[self.index + 1] = now

    def dec(self, amount: float = 1.0) -> None:
        """Take an amount off and note the time."""
        self.inc(-amount)


class Histogram(Handle):
    """Counts of observations by upper bound, and their sum.

    ``index`` is the sum's, ``cells`` are the buckets', ``mark`` the flag to set before a write (see ``marks``).
    """

    __slots__ = ("bounds", "cells", "mark")

    def __init__(
        self, view: memoryview[float], index: int, cells: tuple[int, ...], bounds: tuple[float, ...], mark: int
    ) -> None:
        super().__init__(view, index)
        self.mark = mark
        self.cells = cells
        self.bounds = bounds

    def observe(self, value: float) -> None:
        """Count one observation, in the metric's unit."""
        # The only call comes first: what follows is one uninterrupted step, also while the handle moves elsewhere.
        bucket = bisect_left(self.bounds, value)
        view = self.view
        view[self.mark] = 1.0
        view[self.cells[bucket]] += 1.0
        view[self.index] += value

    def observe_none(self) -> None:
        """Count an observation of 0, where no bound is below that: half the work of ``observe``."""
        view = self.view
        view[self.mark] = 1.0
        view[self.cells[0]] += 1.0

    def observe_many(self, value: float, count: int) -> None:
        """Count the same observation several times."""
        bucket = bisect_left(self.bounds, value)
        view = self.view
        view[self.mark] = 1.0
        view[self.cells[bucket]] += count
        view[self.index] += value * count


_lock = threading.Lock()


class LockedCounter(Counter):
    """A counter for builds without the GIL."""

    __slots__ = ()

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount under the lock."""
        with _lock:
            self.view[self.index] += amount


class LockedGauge(Gauge):
    """A gauge for builds without the GIL."""

    __slots__ = ()

    def inc(self, amount: float = 1.0) -> None:
        """Add an amount under the lock."""
        with _lock:
            self.view[self.index] += amount

    def dec(self, amount: float = 1.0) -> None:
        """Take an amount off under the lock."""
        with _lock:
            self.view[self.index] -= amount


class LockedHistogram(Histogram):
    """A histogram for builds without the GIL."""

    __slots__ = ()

    def observe(self, value: float) -> None:
        """Count one observation under the lock."""
        with _lock:
            super().observe(value)

    def observe_none(self) -> None:
        """Count an observation of 0 under the lock."""
        with _lock:
            super().observe_none()

    def observe_many(self, value: float, count: int) -> None:
        """Count the same observation several times under the lock."""
        with _lock:
            super().observe_many(value, count)


def classes(gil: bool) -> tuple[type[Counter], type[Gauge], type[Histogram]]:
    """Return the classes of handles for an interpreter with or without the GIL: chosen once, not per event."""
    return (Counter, Gauge, Histogram) if gil else (LockedCounter, LockedGauge, LockedHistogram)


def counting_lock() -> AbstractContextManager[object]:
    """Return what keeps counts still while their handles move: nothing is needed under the GIL."""
    return nullcontext() if gil_enabled() else _lock


def gil_enabled() -> bool:
    """Return whether this interpreter runs with the GIL."""
    asked = getattr(sys, "_is_gil_enabled", None)
    return asked is None or bool(asked())


def renew_lock() -> None:
    """Replace the lock in a forked child: another thread of the parent may have held it at the fork."""
    global _lock
    _lock = threading.Lock()
