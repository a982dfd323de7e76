"""Stampedes: several callers that miss one key, so that each of them works out the same value.

A miss opens a fill of its key: from then on somebody works the value out. The fill is over for a caller when it
writes the key or finds it written, when its request or task has ended, or after ``FILL_SECONDS``. A miss of the same
key by another caller meanwhile is a duplicate. Keys are kept as hashes, and only so many.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Final

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache_ages import place_of
from fastapi_headroom.store.writer import Gauge

FILL_SECONDS: Final = 10.0
"""How long a fill may take that nobody ends: outside requests and tasks there is no other end to it."""
MAX_FILLS: Final = 500
"""Keys per cache that are being filled at once; the fills of further ones are not followed."""
MAX_CALLERS: Final = 1_000


class _Fill:
    __slots__ = ("callers", "until")

    def __init__(self, caller: object, until: float) -> None:
        self.callers = {caller}
        self.until = until


class Fills:
    """The keys of one cache that are being filled. Times are seconds of ``perf_counter``."""

    __slots__ = ("_gauge", "open")

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        """Callers that fill what another one is filling already."""
        self.open: dict[int, _Fill] = {}
        """By the hash of the key."""
        gauge.set(0.0)

    def missed(self, key: object, request: Ledger | None, now: float) -> bool:
        """Take note of a miss; return whether another caller is filling that key already."""
        place, caller = place_of(key), request if request is not None else _caller()
        fill = self.open.get(place)
        if fill is None or fill.until < now or not any(map(_is_busy, tuple(fill.callers))):
            if fill is not None:
                if len(fill.callers) > 1:
                    self._gauge.dec(len(fill.callers) - 1)
            elif len(self.open) >= MAX_FILLS and not self.sweep(now):
                return False
            self.open[place] = _Fill(caller, now + FILL_SECONDS)
            return False
        if caller in fill.callers or len(fill.callers) >= MAX_CALLERS:
            return False
        fill.callers.add(caller)
        self._gauge.inc()
        return True

    def ended(self, key: object, request: Ledger | None, *, written: bool) -> None:
        """Take note that a caller wrote the key, or found it written: it does not fill it any longer.

        One that did not miss it and writes it ends the fill for all.
        """
        place = place_of(key)
        fill = self.open.get(place)
        if fill is None:
            return
        caller = request if request is not None else _caller()
        left = len(fill.callers) - 1
        if caller in fill.callers:
            fill.callers.discard(caller)
            if left:
                self._gauge.dec()
                return
        elif not written:
            return
        else:
            self._gauge.dec(left)
        self.open.pop(place, None)

    def sweep(self, now: float) -> bool:
        """Drop what has ended without a word; return whether there is room for another fill."""
        waiting = 0
        for place, fill in tuple(self.open.items()):
            callers = {caller for caller in tuple(fill.callers) if _is_busy(caller)}
            if not callers or fill.until < now:
                self.open.pop(place, None)
            else:
                fill.callers = callers
                waiting += len(callers) - 1
        self._gauge.set(float(waiting))
        return len(self.open) < MAX_FILLS


def _caller() -> object:
    """Return who calls outside a request: the task, else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task if task is not None else threading.current_thread()


def _is_busy(caller: object) -> bool:
    if isinstance(caller, Ledger):
        return not caller.finished
    if isinstance(caller, asyncio.Future):
        return not caller.done()
    return not isinstance(caller, threading.Thread) or caller.is_alive()
