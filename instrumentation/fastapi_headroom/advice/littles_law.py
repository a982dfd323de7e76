"""The size of a connection pool that its checkouts ask for, and how long they would wait at other sizes.

Little's law gives the connections in use on average: checkouts per second times seconds of hold, in erlangs. A pool of
just that size would make everybody wait, so what is above the average is taken from how the checkouts come:

- the share that waits is Erlang's delay formula, on a load and a size both divided by the *peakedness* of the arrivals
  (Hayward's approximation: A. A. Fredericks, "Congestion in Blocking Systems - A Simple Approximation Technique", Bell
  System Technical Journal 59(6), 1980). Peakedness is 1 for arrivals that know nothing of each other, above 1 for
  bursts, below 1 for a steady drip. It is measured by the arrivals themselves: where nobody has to wait it is 1 plus
  the connections in use that a checkout finds on average, less those in use over time (A. E. Eckberg, "Generalized
  Peakedness of Teletraffic Processes", 1983);
- those who wait do so for a time that falls off exponentially, stretched by the mean of that peakedness and the squared
  coefficient of variation of the holds (A. O. Allen, "Probability, Statistics, and Queueing Theory", 1990: the
  Allen-Cunneen approximation for G/G/c);
- bursts have shapes that no two numbers tell. What checkouts really found in use is therefore a second opinion, and the
  more cautious of the two counts.

A pool that is too small hides the demand: see :func:`demand_of`. Hold times count as they are: where they are
long because the database is overloaded, a larger pool makes them longer still, and no formula here knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf, sqrt
from typing import Final, NamedTuple

from fastapi_headroom import thresholds
from fastapi_headroom.advice.erlang import erlang_c, erlang_tails
from fastapi_headroom.advice.histogram import Histogram

TARGET: Final = thresholds.POOL_TARGET_WAIT_P95
LATE: Final = 0.05
"""Share of checkouts that may wait longer than the target: what p95 means."""
LARGEST: Final = 2_000
"""Connections; no larger pool is ever recommended."""
LONGEST: Final = 60.0
"""Seconds; a longer predicted wait is no prediction."""
FACTORS: Final = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Sizes that are looked at beside the recommended one, as its multiples."""
_BURSTY: Final = 2.0
"""Peakedness from which on checkouts come together."""
_STEADY: Final = 0.5
"""Variance over mean of what arrivals find, under which they are no chance arrivals."""
_OUTLIVED: Final = 0.7
"""Load per connection from which on a line that forms lives longer than the burst that made it."""
_PEAKEDNESS: Final = (0.1, 500.0)
_FULL: Final = 0.95
"""Load per connection from which on a pool holds its callers back."""
_EVERYBODY: Final = 0.9
"""Share of late checkouts from which on waits say nothing of the demand any more."""


class Window(NamedTuple):
    """What one worker's pool did for a while."""

    seconds: float
    holds: Histogram
    """Seconds from checkout to checkin, of those that ended within the window."""
    waits: Histogram
    """Seconds that checkouts waited."""
    found: Histogram
    """Connections in use and checkouts waiting that each checkout found when it asked."""
    limit: float
    """Connections that the pool may open; infinite where it has no limit."""
    dispersion: float = 1.0
    """Variance over mean of the checkouts per interval: 1 for arrivals that know nothing of each other."""


class Demand(NamedTuple):
    """What the checkouts ask of a pool, whatever its present size."""

    load: float
    """Connections in use on average if nobody waited: erlangs."""
    hold: float
    """Mean seconds of a hold."""
    peakedness: float
    hold_variation: float
    """Squared coefficient of variation of the holds."""
    found: Histogram | None
    """What arrivals find in use if nobody waits; None where the present waits distort it."""
    holds: Histogram

    def late(self, size: float, seconds: float) -> float:
        """Return the share of checkouts that would wait longer than that at a size."""
        share = self._formula(size, seconds)
        return share if self.found is None else max(share, self._seen(self.found, int(size), seconds))

    def wait_p95(self, size: float) -> float | None:
        """Return the predicted 95th percentile of the wait in seconds; None where it would grow without bound."""
        if self.late(size, 0.0) <= LATE:
            return 0.0
        if self.late(size, LONGEST) > LATE:
            return None
        low, high = 0.0, LONGEST
        while high - low > max(1e-5, high / 100):
            middle = (low + high) / 2 if low else high / 8
            low, high = (middle, high) if self.late(size, middle) > LATE else (low, middle)
        return high

    def size(self, target: float = TARGET) -> int:
        """Return the smallest size whose predicted p95 wait is at or under the target."""
        return smallest(lambda size: self.late(size, target) <= LATE)

    def _formula(self, size: float, seconds: float) -> float:
        if size <= self.load:
            return 1.0
        share = erlang_c(size / self.peakedness, self.load / self.peakedness)
        stretch = (self.peakedness + self.hold_variation) / 2
        return share * _falling(seconds * (size - self.load) / (self.hold * stretch)) if share > LATE else share

    def _seen(self, found: Histogram, size: int, seconds: float) -> float:
        """Count the arrivals that find no free connection and would not get one in time.

        They need as many checkins as there are checkouts before them. Those come one by one where arrivals are
        spread; a burst that was let in together leaves together as well, after a hold, round by round.
        """
        late = 0.0
        tails = erlang_tails(size / self.hold, seconds)
        reached, one_by_one = 0, 0.0
        for number, share in found.whole_numbers():
            if number < size:
                continue
            missing = number - size + 1
            while reached < missing:
                reached, one_by_one = reached + 1, next(tails)
            if self.peakedness >= _BURSTY:
                late += share * max(one_by_one, self.holds.share_above(seconds / ceil(missing / size)))
            else:
                late += share * one_by_one
        return late


class Advice(NamedTuple):
    """A recommended size, and what it follows from."""

    size: int
    demand: Demand
    limit: float

    @property
    def waits(self) -> dict[str, float]:
        """The predicted p95 wait in seconds at multiples of the size, and at the ``actual`` one."""
        sizes = {f"{factor:g}x": float(max(1, round(self.size * factor))) for factor in FACTORS}
        if 1 <= self.limit < inf:
            sizes["actual"] = self.limit
        return {name: wait for name, at in sizes.items() if (wait := self.demand.wait_p95(at)) is not None}


def demand_of(window: Window, target: float = TARGET) -> Demand | None:
    """Return the demand behind what was observed; None where it is too little to tell.

    While nearly nobody waits, what is seen is the demand. While some wait, the peakedness is the one that explains
    their share. While the pool is full all the time it hides the demand, and there are two cases. Callers that do not
    wait for their answers before they come again pile up: their rate is known from the checkouts that were asked for.
    Callers that do (a fixed crowd, each with one request at a time) hold a place in the line each: the line hardly
    varies, and each place in it is a connection that would be in use.
    """
    if window.seconds <= 0 or window.holds.count < 1 or window.found.count < 1:
        return None
    hold = window.holds.mean
    load = window.found.count / window.seconds * hold
    if hold <= 0 or load <= 0:
        return None
    variation = window.holds.variation()
    late = window.waits.share_above(target)
    plain = Demand(load, hold, 1.0, variation, None, window.holds)
    if late <= LATE:
        return plain._replace(peakedness=_measured(window.found, load), found=window.found)
    if late < _EVERYBODY and load < _FULL * window.limit:
        peakedness = _explaining(plain, window.limit, target, late)
        if peakedness >= _BURSTY and load < _OUTLIVED * window.limit:
            return plain._replace(peakedness=_measured(window.found, load), found=window.found)
        return plain._replace(peakedness=peakedness)
    if window.found.count <= 1.05 * window.holds.count and window.found.spread() < _STEADY:
        # the formula's randomness is not theirs: as many as stand in line are needed, and no more
        return plain._replace(load=min(load, window.found.mean), peakedness=_PEAKEDNESS[0], found=window.found)
    return plain._replace(peakedness=_bounded(max(1.0, window.dispersion)))


def advise(window: Window, target: float = TARGET, most: float = inf) -> Advice | None:
    """Return the size for one worker, no more than ``most``; None where there is too little to tell."""
    demand = demand_of(window, target)
    if demand is None:
        return None
    return Advice(max(1, int(min(demand.size(target), most))), demand, window.limit)


def smallest(fits: Callable[[int], bool]) -> int:
    """Return the smallest size from 1 to LARGEST that fits, where every larger one does too."""
    high = 1
    while high < LARGEST and not fits(high):
        high = min(2 * high, LARGEST)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _measured(found: Histogram, load: float) -> float:
    """Return the peakedness that arrivals tell of; where what they find hardly varies, they come like clockwork."""
    spread = found.spread()
    return _bounded(spread if spread < _STEADY else 1.0 + found.mean - load)


def _explaining(plain: Demand, limit: float, target: float, late: float) -> float:
    """Return the peakedness under which the formula gives the share of late checkouts that was observed."""
    low, high = _PEAKEDNESS
    for _ in range(24):
        middle = sqrt(low * high)
        tried = plain._replace(peakedness=middle)
        low, high = (middle, high) if tried.late(limit, target) < late else (low, middle)
    return sqrt(low * high)


def _bounded(peakedness: float) -> float:
    return min(max(peakedness, _PEAKEDNESS[0]), _PEAKEDNESS[1])


def _falling(exponent: float) -> float:
    return 2.718281828459045**-exponent if exponent < 700 else 0.0
