"""Statements that one request runs again and again, differing only in their values: N+1.

Up to the tenth statement of a request a hook only remembers the texts; nothing can have been run ten times before.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.checkout_site import frames_here, named
from fastapi_headroom.probes.pool_series import UNMATCHED
from fastapi_headroom.probes.shape import shape_of
from fastapi_headroom.store.writer import Counter, Writer
from fastapi_headroom.thresholds import REPEATED_STATEMENTS

log = logging.getLogger("fastapi_headroom")

LAST: Final = 500
"""Statements of one request that are compared: a longer one would pay for nothing new."""
MAX_TOLD: Final = 200
"""Pairs of route and shape that are told in the log; all are counted."""


class Seen:
    """How often a request has run the statements of one shape."""

    __slots__ = ("shape", "times")

    def __init__(self, shape: str) -> None:
        self.shape = shape
        self.times = 0


class Repeats:
    """Counts the statements of requests that have run at least REPEATED_STATEMENTS of them."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._writer: Writer | None = None
        self._series: dict[str, Counter] = {}
        self._told: set[tuple[str, str]] = set()

    def bind(self, writer: Writer | None) -> None:
        """Write to ``writer`` from now on, or nowhere."""
        self._writer = writer
        self._series = {}

    def note(self, request: Ledger, text: str, dialect: Any) -> None:
        """Take note of a statement that ran, the request's REPEATED_STATEMENTS-th or a later one. Never raises."""
        try:
            shapes = request.shapes
            if shapes is None:
                shapes = request.shapes = {}
                earlier = request.texts
                request.texts = None
                while earlier is not None:
                    _seen(shapes, earlier[0], dialect.name).times += 1
                    earlier = earlier[1]
            seen = shapes.get(text) or _seen(shapes, text, dialect.name)
            seen.times += 1
            if seen.times == REPEATED_STATEMENTS:
                self._found(request, seen.shape)
        except Exception as failure:
            self._guard.failed(failure)

    def _found(self, request: Ledger, shape: str) -> None:
        if self._writer is None:
            return
        route = request.route or UNMATCHED
        series = self._series.get(route)
        if series is None:
            series = self._series[route] = self._writer.counter(catalog.REPEATED_STATEMENTS, route)
        series.inc()
        if (route, shape) in self._told or len(self._told) >= MAX_TOLD:
            return
        self._told.add((route, shape))
        log.warning(
            "fastapi-headroom: one request of route %s ran the same statement %d times, with other values only (N+1), "
            "at %s: %s; load the rows at once: selectinload() or joinedload() for a relationship, else WHERE ... IN",
            *(route, REPEATED_STATEMENTS, named(frames_here()) or "unknown", shape),
        )


def _seen(shapes: dict[str, Seen], text: str, system: str) -> Seen:
    """Return what is kept of a text's shape: the same object for every text of that shape."""
    seen = shapes.get(text)
    if seen is None:
        shape = shape_of(text, system)
        seen = shapes[text] = shapes.setdefault(shape, Seen(shape))
    return seen
