"""The pool's advisor in the exporter: watches each worker's pools over a sliding window and sizes them.

It works on a thread of its own every few seconds, and the scrape takes its last result, so it adds nothing to a scrape.
What was seen is kept in memory: an exporter that starts anew says nothing for its first minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Final

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.advice.littles_law import Advice, Window, advise
from fastapi_headroom.catalog import Metric
from fastapi_headroom.exporter.pool_rows import HISTOGRAMS, Place, PoolReader, PoolRows

log = logging.getLogger("fastapi_headroom")

INTERVAL: Final = 10.0
"""Seconds between two looks."""
WINDOW: Final = 600.0
"""Seconds that are looked back over."""
_FOLDED: Final = "_OTHER"
"""The pool name that many pools share: their sum is no pool that could be sized."""
Row = tuple[Metric, tuple[str, ...], float]


class PoolAdvisor:
    """Advice for the pools of one store."""

    def __init__(
        self,
        directory: Path,
        *,
        interval: float = INTERVAL,
        window: float = WINDOW,
        least_seconds: float = thresholds.POOL_ADVICE_SECONDS,
        least_checkouts: float = thresholds.POOL_ADVICE_CHECKOUTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alive: Collection[int] | None = None
        """The slots whose worker lives, as the last scrape saw them; None before the first."""
        self._reader = PoolReader(directory)
        self._interval, self._clock = interval, clock
        self._least_seconds, self._least_checkouts = least_seconds, least_checkouts
        self._seen: deque[tuple[float, dict[Place, PoolRows]]] = deque(maxlen=max(2, round(window / interval) + 1))
        self._rows: list[Row] = []
        self._failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headroom-pool-advisor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; does not wait for a look that is under way."""
        self._stop.set()

    def rows(self) -> list[Row]:
        """Return the last advice; nothing while there is too little to tell."""
        return self._rows

    def look(self) -> None:
        """Take note of the counters and make up the advice anew."""
        self._seen.append((self._clock(), self._reader.read()))
        by_pool: dict[str, list[Place]] = {}
        for place in self._seen[-1][1]:
            if place[1] != _FOLDED and (self.alive is None or place[0] in self.alive):
                by_pool.setdefault(place[1], []).append(place)
        self._rows = [row for pool, places in sorted(by_pool.items()) for row in self._advise(pool, places)]

    def window_of(self, place: Place) -> Window | None:
        """Return what one worker's pool did within the window; None while that is too little."""
        seen = [(at, rows[place]) for at, rows in self._seen if place in rows and _complete(rows[place])]
        if len(seen) < 2:
            return None
        (began, first), (ended, last) = seen[0], seen[-1]
        holds, waits, found = (last.since(first, metric) for metric in HISTOGRAMS)
        limit = last.gauges.get(catalog.POOL_MAX, inf)
        if ended - began < self._least_seconds or found.count < self._least_checkouts or limit < 1:
            return None
        asked = [sum(rows.counts[catalog.POOL_DEMAND][1:]) for _, rows in seen]
        steps = [after - before for before, after in pairwise(asked)]
        mean = sum(steps) / len(steps)
        dispersion = sum((step - mean) ** 2 for step in steps) / len(steps) / mean if mean > 0 else 1.0
        return Window(ended - began, holds, waits, found, limit, dispersion)

    def _advise(self, pool: str, places: list[Place]) -> list[Row]:
        """Size a pool for the worker that needs the largest one: all workers are configured alike."""
        latest = self._seen[-1][1]
        database = max((latest[place].gauges.get(catalog.DATABASE_CONNECTIONS_MAX, 0.0) for place in places), default=0)
        sharing = sum(catalog.POOL_MAX in latest[place].gauges for place in places)
        most = max(1.0, database // sharing) if database and sharing else inf
        windows = [window for place in places if (window := self.window_of(place)) is not None]
        rows: list[Row] = [(catalog.POOL_WORKERS, (pool,), float(sharing))] if sharing else []
        advice = [found for window in windows if (found := advise(window, most=most)) is not None]
        if not advice:
            return rows
        chosen: Advice = max(advice, key=lambda it: (it.size, it.demand.load))
        rows.append((catalog.POOL_RECOMMENDED, (pool,), float(chosen.size)))
        rows.append((catalog.POOL_PEAK, (pool,), max((window.found.highest() or 0.0) for window in windows) + 1.0))
        rows += [(catalog.POOL_PREDICTED_WAIT, (pool, size), wait) for size, wait in chosen.waits.items()]
        return rows

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
                self._failed = False
            except Exception:
                self._rows = []
                if not self._failed:
                    log.exception("fastapi-headroom: no advice on pool sizes; metrics are not affected")
                self._failed = True
            self._stop.wait(self._interval)


def _complete(rows: PoolRows) -> bool:
    return all(metric in rows.counts for metric in HISTOGRAMS)
