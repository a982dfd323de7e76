"""What size a live pool should have next, from what its checkouts did lately. Pure: readings in, a decision out.

*Up* at once: to what the checkouts need now, but at most twice the size per reading, so that a server never gets a
storm of connects. *Down* slowly: only to the most that was needed for a while (``patience``), by a quarter of the way
per step (as Kubernetes' HorizontalPodAutoscaler does with its stabilisation window).

What the checkouts need is the largest of

- what 95 % of them found in use or waiting in the last seconds, and one for the checkout itself;
- who has a connection and who waits for one, at this moment, if somebody waits;
- Little's law: checkouts per second of the last moments times seconds of hold.

More connections are of no use where something else is short. So the pool does not grow beyond what a fixed size would
be while the process has no CPU to spare. And a pool that is full for a while is tried at two thirds of its size: if it
serves as much there, the database (its CPU, its disk, a lock) is what is short, and the pool stays there, to try a
larger size again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil
from typing import Final, Literal, NamedTuple

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.advice.histogram import Histogram

WINDOW: Final = 10.0
"""Seconds of checkouts that are looked back over for what they found, and for how long they held."""
LATELY: Final = 2.0
"""Seconds over which the rate of checkouts is taken."""
COVERED: Final = 0.95
"""Share of the checkouts that should find a free connection: what p95 means."""
STEP_DOWN: Final = 2.0
"""Seconds between two steps down."""
SETTLED: Final = 1.0
"""Seconds after a change in which new connections are opened: nothing is concluded from them."""
SURE: Final = 20.0
"""Checkouts served under which a rate is no evidence."""
FULL_FOR: Final = 5.0
"""Seconds that a pool must have been full before a smaller size is tried."""
TRIED_FOR: Final = 2.0
"""Seconds that the smaller size must have been full before it is judged."""
TRIED_AT_MOST: Final = 10.0
"""Seconds after which a trial without a result ends."""
TRIAL: Final = 1.5
"""Times that a size is larger than the one that is tried against it."""
USEFUL: Final = 0.25
"""Part of a difference in size that must be seen in throughput: half as many more must serve an eighth more."""
FORBEARANCE: Final = 60.0
"""Seconds for which the result of a trial stands."""
Reason = Literal["demand", "idle", "trial", ""]
Held = Literal["cpu", "database", "maximum", ""]


class Reading(NamedTuple):
    """What is known of one worker's pool at one moment. Times are monotonic seconds; counts only ever rise."""

    at: float
    limit: int
    used: int
    """Connections checked out."""
    waiting: int
    """Checkouts that wait."""
    found: Sequence[float]
    """Checkouts so far, by bucket of ``headroom_pool_demand``."""
    served: float
    """Checkouts that ended so far."""
    held: float
    """Seconds that they held their connections."""
    busy: float
    """Share of the time since the last reading that the process (or its event loop's thread) ran or wanted to."""


class Decision(NamedTuple):
    """The size to have next and why, and what holds it back from more."""

    size: int
    reason: Reason
    held: Held
    wanted: int
    """What was needed within the patience, whatever the maximum is."""


class _Stay(NamedTuple):
    """A time for which a pool of one size was full."""

    size: int
    began: float
    seconds: float = 0.0
    served: float = 0.0

    @property
    def rate(self) -> float:
        return self.served / self.seconds if self.seconds else 0.0


class Controller:
    """Decides for one pool of one worker."""

    def __init__(self, minimum: int, maximum: int, patience: float, *, enough: int | None = None) -> None:
        """Sizes are connections; ``patience`` is seconds of lower demand before the pool shrinks.

        ``enough`` is the size up to which the pool grows without CPU to spare as well (default: the minimum): what a
        fixed size would be. Slow requests hold connections for longer, and must not be turned away for that.
        """
        self._minimum, self._maximum, self._patience = minimum, maximum, patience
        self._enough = minimum if enough is None else max(minimum, min(enough, maximum))
        self._readings: deque[Reading] = deque()
        self._needs: deque[tuple[float, int]] = deque()
        self._changed = self._stepped = 0.0
        self._stay = _Stay(0, 0.0)
        self._trial: tuple[_Stay, float] | None = None
        """The larger size that a smaller one is tried against, and since when."""
        self._useful: tuple[int, float] | None = None
        """A size of which each connection is of use, and until when that is believed."""
        self._ceiling: tuple[int, float] | None = None
        """A size beyond which connections are of no use, and until when that is believed."""

    def decide(self, now: Reading) -> Decision:
        """Take a reading and say what size to have next."""
        last = self._readings[-1] if self._readings else None
        if last is not None and (now.served < last.served or sum(now.found) < sum(last.found)):
            self._readings.clear()  # counted anew: another store
            last = None
        self._readings.append(now)
        while len(self._readings) > 2 and self._readings[1].at < now.at - WINDOW:
            self._readings.popleft()
        need = self._need(now)
        self._needs.append((now.at, need))
        while self._needs[0][0] < now.at - self._patience:
            self._needs.popleft()
        wanted = max(need for _, need in self._needs)
        if last is not None:
            self._watch(last, now)
        size, reason, held = self._next(now, need, max(self._minimum, min(wanted, self._maximum)))
        return Decision(size, reason, held, wanted)

    def _next(self, now: Reading, need: int, calm: int) -> tuple[int, Reason, Held]:
        if self._trial is not None:
            return self._judge(now, *self._trial)
        most = self._most(now.at, need > now.limit)
        held: Held = "maximum" if most == self._maximum else "database"
        if self._may_try(now):
            self._trial = self._stay, now.at
            return max(self._minimum, ceil(now.limit / TRIAL)), "trial", held
        if need > now.limit:
            if now.limit >= most:
                return now.limit, "", held
            if now.busy >= thresholds.POOL_AUTOSIZE_BUSY:
                if now.limit >= self._enough:
                    return now.limit, "", "cpu"
                most = min(most, self._enough)
            return min(need, most, max(2 * now.limit, now.limit + 2)), "demand", ""
        if calm < now.limit and now.at - self._stepped >= STEP_DOWN:
            self._stepped = now.at
            return now.limit - max(1, (now.limit - calm) // 4), "idle", ""
        return max(now.limit, self._minimum), "demand" if now.limit < self._minimum else "", ""

    def _most(self, at: float, short: bool) -> int:
        """Return the largest size that may be of use; what was found to be of none is tried again, a step at a time."""
        if self._ceiling is not None and at >= self._ceiling[1]:
            self._ceiling = (ceil(self._ceiling[0] * TRIAL), at + FORBEARANCE) if short else None
        return self._maximum if self._ceiling is None else min(self._maximum, max(self._ceiling[0], self._minimum))

    def _may_try(self, now: Reading) -> bool:
        stay, useful = self._stay, self._useful
        if useful is not None and now.at < useful[1] and now.limit <= useful[0]:
            return False
        full = stay.size == now.limit and stay.seconds >= FULL_FOR and stay.served >= SURE
        return full and now.limit > self._minimum and now.busy < thresholds.POOL_AUTOSIZE_BUSY

    def _judge(self, now: Reading, larger: _Stay, since: float) -> tuple[int, Reason, Held]:
        """Compare what the pool serves at the smaller size with what it served at the larger one."""
        stay = self._stay
        if stay.size < larger.size and stay.seconds >= TRIED_FOR and stay.served >= SURE:
            self._trial = None
            if larger.rate >= stay.rate * (1 + USEFUL * (larger.size / stay.size - 1)):
                self._useful = larger.size, now.at + FORBEARANCE
                return larger.size, "trial", ""
            self._ceiling = stay.size, now.at + FORBEARANCE
            return now.limit, "", "database"
        if now.at - since > TRIED_AT_MOST or (not now.waiting and now.at - self._changed > 2 * SETTLED):
            self._trial = None
            self._useful = larger.size, now.at + FORBEARANCE
            return larger.size, "trial", ""
        return min(now.limit, max(self._minimum, ceil(larger.size / TRIAL))), "trial", "database"

    def _need(self, now: Reading) -> int:
        """Return how many connections the checkouts of the last moments need."""
        first = self._readings[0]
        found = Histogram(
            catalog.POOL_DEMAND.buckets, [b - a for a, b in zip(first.found, now.found, strict=True)], 0.0
        )
        need = now.used + now.waiting if now.waiting else 0
        if found.count:
            need = max(need, _quantile(found, COVERED) + 1)
        served = now.served - first.served
        recent = next(reading for reading in self._readings if reading.at >= now.at - LATELY)
        if served and now.at - recent.at >= LATELY / 2:
            rate = (sum(now.found) - sum(recent.found)) / (now.at - recent.at)
            need = max(need, ceil(rate * (now.held - first.held) / served))
        return need

    def _watch(self, last: Reading, now: Reading) -> None:
        """Sum up what the pool served while it was full, by size."""
        if now.limit != self._stay.size:
            self._changed = now.at
            self._stay = _Stay(now.limit, now.at)
        elif not (now.waiting and last.waiting and now.used >= now.limit):
            if not now.waiting and not last.waiting:
                self._stay = _Stay(now.limit, now.at)
        elif now.at - self._changed >= SETTLED:
            stay = self._stay
            if stay.seconds > WINDOW:  # traffic changes: what is old weighs less
                stay = stay._replace(seconds=stay.seconds / 2, served=stay.served / 2)
            self._stay = stay._replace(
                seconds=stay.seconds + now.at - last.at, served=stay.served + now.served - last.served
            )


def _quantile(found: Histogram, share: float) -> int:
    """Return the smallest number of connections that so many found at most; exact up to 10, else a bucket's bound."""
    seen = 0.0
    for bound, count in zip(found.bounds, found.counts, strict=False):
        seen += count
        if seen >= share * found.count:
            return int(bound)
    return int(found.bounds[-1])
