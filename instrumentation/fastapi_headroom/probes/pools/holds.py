"""Connections of other libraries' database pools that are held for long: counted once each, and told in the log.

Where they were checked out is not kept: to look at the stack would cost as much as all the rest of a checkout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import perf_counter

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.long_holds import Told
from fastapi_headroom.probes.pool_series import OUTSIDE, UNMATCHED
from fastapi_headroom.probes.pools.meter import Meter

log = logging.getLogger("fastapi_headroom")


class MeterHolds:
    """Finds the holds that last ``threshold`` seconds or longer, at most one look after the threshold."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._told = Told()
        self._counted: set[tuple[int, float]] = set()
        """The long holds that were counted and last, by connection and start."""

    def rearm(self) -> None:
        """Begin anew, as after a fork."""
        self._told, self._counted = Told(), set()

    def look(self, meters: Iterable[Meter]) -> None:
        """Count and tell what has been held for too long and was not told yet."""
        now, last = perf_counter(), set()
        for meter in meters:
            for connection, (started, request) in list(meter.holds.items()):
                if now - started < self._threshold:
                    continue
                last.add((connection, started))
                if (connection, started) not in self._counted:
                    meter.series.route(request).long_holds().inc()
                    self._tell(meter.series.name, request, now - started)
        self._counted = last

    def _tell(self, pool: str, request: Ledger | None, seconds: float) -> None:
        route = OUTSIDE if request is None else request.route or UNMATCHED
        if not self._told.is_due((pool, route)):
            return
        log.warning(
            "fastapi-headroom: a connection of pool %s has been held for %.1f s by %s%s",
            *(pool, seconds, "work outside of requests" if request is None else f"route {route}"),
            ", which was answered: release it, best by `async with`"
            if request is not None and request.finished
            else "",
        )
