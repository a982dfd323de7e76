"""Erlang's formulas, also for numbers of servers that are not whole, which the correction for bursts needs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import exp
from typing import Final

_STEPS: Final = 120
_FAR: Final = 40.0
"""Where the integrand's exp(-u) has fallen below 1e-17."""


def erlang_b(servers: float, load: float) -> float:
    """Return the share of arrivals that find all servers busy where nobody waits (Erlang's loss formula).

    ``servers`` >= 0 may be a fraction, ``load`` > 0 is in erlangs: arrivals per second times seconds of service.
    The continuous form is 1/B = integral of load * exp(-load * t) * (1 + t)**servers over t from 0 to infinity, and
    1/B(x) = 1 + x / load / B(x - 1) (D. L. Jagerman, "Some Properties of the Erlang Loss Function", Bell System
    Technical Journal 53(3), 1974).
    """
    whole = int(servers)
    rest = servers - whole
    inverse = _inverse_of_fraction(rest, load) if rest else 1.0
    for step in range(1, whole + 1):
        inverse = 1.0 + (rest + step) / load * inverse
        if inverse > 1e300:
            return 0.0
    return 1.0 / inverse


def erlang_c(servers: float, load: float) -> float:
    """Return the share of arrivals that must wait, 1 where the load is no smaller than the servers.

    Erlang's delay formula, for first come, first served.
    """
    if load <= 0:
        return 0.0
    if load >= servers:
        return 1.0
    blocked = erlang_b(servers, load)
    return blocked / (1.0 - load / servers * (1.0 - blocked))


def erlang_tails(rate: float, seconds: float) -> Iterator[float]:
    """Yield the probability that 1, 2, 3, ... events of a Poisson process take longer than ``seconds``."""
    mean = rate * seconds
    if mean > 600:  # exp() would be 0 and all sums with it; so far from the mean it is certain
        yield from (0.0 if number < mean else 1.0 for number in count(1))
    term = total = exp(-mean)
    for number in count(1):
        yield min(1.0, total)
        term *= mean / number
        total += term


def _inverse_of_fraction(servers: float, load: float) -> float:
    """Return 1/B for less than one server: Simpson's rule with u = load * t and u = v**3, as the start is steep."""
    end = _FAR ** (1 / 3)
    width = end / _STEPS
    total = 0.0
    for step in range(1, _STEPS):
        v = step * width
        u = v * v * v
        total += (4 if step % 2 else 2) * 3 * v * v * exp(-u) * (1.0 + u / load) ** servers
    return float(total * width / 3)
