"""Connections that are held for long: counted once each, and told in the log while they are still held.

A session that nobody closes never comes back to the pool, so a hook of the checkin would never hear of it. What is
checked out is therefore looked through about once a second: a hold is found at most one such interval after the
threshold.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from time import perf_counter
from typing import Final

from fastapi_headroom.probes.checkout_site import described, key, where_now
from fastapi_headroom.probes.pool_series import OUTSIDE, UNMATCHED, Hold, PoolState

log = logging.getLogger("fastapi_headroom")

LOG_INTERVAL: Final = 60.0
"""Seconds until the same place of checkout is told again."""
MAX_PLACES: Final = 100
"""Places of checkout that are told within that time."""


class Told:
    """The places that were told in the log lately: each once per LOG_INTERVAL, and no more than MAX_PLACES of them."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, ...], float] = {}

    def is_due(self, place: tuple[str, ...]) -> bool:
        """Return whether a place may be told now, and take note that it was."""
        now = time.monotonic()
        self._at = {known: at for known, at in self._at.items() if now - at < LOG_INTERVAL}
        if place in self._at or len(self._at) >= MAX_PLACES:
            return False
        self._at[place] = now
        return True


class LongHolds:
    """Finds the holds that last ``threshold`` seconds or longer."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._lock = threading.Lock()
        self._told = Told()

    def rearm(self) -> None:
        """Forget what was told. A fork may have left the lock held by a thread that is no more."""
        self._lock = threading.Lock()
        self._told = Told()

    def look(self, states: Iterable[PoolState]) -> None:
        """Count and tell what has been held for too long and was not told yet."""
        now = perf_counter()
        for state in states:
            for hold in list(state.held):
                if now - hold.started >= self.threshold and self.count(hold):
                    self._tell(hold, now - hold.started)

    def count(self, hold: Hold) -> bool:
        """Count a long hold; False when that was done before."""
        with self._lock:  # it may come back while it is looked at
            if hold.counted:
                return False
            hold.counted = True
        hold.state.series.route(hold.ledger).long_holds.inc()
        return True

    def _tell(self, hold: Hold, seconds: float) -> None:
        pool = hold.state.series.name
        route = OUTSIDE if hold.ledger is None else hold.ledger.route or UNMATCHED
        if not self._told.is_due((pool, route, key(hold.site))):
            return
        log.warning(
            "fastapi-headroom: a connection of pool %s has been held for %.1f s by %s, of which statements ran %.1f s; "
            "checked out at %s; %s",
            *(pool, seconds, f"route {route}" if hold.ledger is not None else "work outside of requests", hold.busy),
            described(hold.site),
            _holder(hold),
        )


def _holder(hold: Hold) -> str:
    """Return what became of who holds the connection."""
    place, remedy = where_now(hold.holder, hold.site), "close the session or connection, best by `with` or `async with`"
    if isinstance(hold.holder, int):  # the number of a thread, which another one may have by now
        if place is not None:
            return f"its thread stands at {place}"
        return f"its thread has ended or gone on, and nothing gave the connection back: {remedy}"
    task = None if hold.holder is None else hold.holder()
    if task is None or task.done():
        return f"its task has ended and nothing gave the connection back: {remedy}"
    return f"its task {task.get_name()} stands at {place or 'no code of the app'}"
