"""Connections that nobody is left to give back, as a gauge that an alert can stand on.

A connection that is held for long is no leak: a stream holds one for as long as its client reads. A leak is one whose
holder has ended, and its request too, and on which no statement runs: what could still close it is the garbage
collector, and that only if nothing keeps the session.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import inf
from time import perf_counter

from fastapi_headroom.probes.checkout_site import Holder, Site
from fastapi_headroom.probes.foreign_frames import walking
from fastapi_headroom.probes.pool_series import OUTSIDE, UNMATCHED, Hold, PoolState
from fastapi_headroom.store.writer import Gauge


class Leaks:
    """Finds the holds of ``threshold`` seconds or longer that were abandoned."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._seen: dict[Hold, tuple[float, float]] = {}
        """By abandoned hold: how long statements have run on it, and when that was seen to change."""
        self._written: dict[tuple[str, str], Gauge] = {}
        """The gauges that were written, by pool and route. There is none where nothing has ever leaked."""

    def rearm(self) -> None:
        """Begin anew, as after a fork."""
        self._seen, self._written = {}, {}

    def look(self, states: Iterable[PoolState]) -> None:
        """Write the gauges."""
        now = perf_counter()
        before, self._seen = self._seen, {}
        found = dict.fromkeys(self._written, 0)
        for state in states:
            for hold in list(state.held):
                if now - hold.started < self._threshold or not abandoned(hold):
                    continue
                busy, since = before.get(hold, (hold.busy, -inf))
                if busy != hold.busy:  # somebody else works with it
                    busy, since = hold.busy, now
                self._seen[hold] = busy, since
                if now - since >= self._threshold:
                    route = OUTSIDE if hold.ledger is None else hold.ledger.route or UNMATCHED
                    place = state.series.name, route
                    if place not in self._written:
                        self._written[place] = state.series.leaked(route)
                    found[place] = found.get(place, 0) + 1
        for place, number in found.items():
            self._written[place].set(number)


def abandoned(hold: Hold) -> bool:
    """Return whether nobody is left who would give a connection back. Where that is not certain it is not.

    A request that goes on may close what one of its tasks has checked out (``asyncio.wait_for`` makes a task before
    Python 3.12), and a thread outside of any request may have gone on in a function further out.
    """
    request = hold.ledger
    return (request is None or request.finished) and _ended(hold.holder, hold.site, in_request=request is not None)


def _ended(holder: Holder, site: Site, *, in_request: bool) -> bool:
    if isinstance(holder, int):
        codes = {code for code, _ in site}
        with walking():
            frame = sys._current_frames().get(holder)
            if frame is None or not in_request:
                return frame is None
            while frame is not None:
                if frame.f_code in codes:
                    return False
                frame = frame.f_back
            return True
    task = None if holder is None else holder()
    return holder is not None and (task is None or task.done())
