"""The size of a simulated pool follows its load: up at once, down slowly, and not where more would be of no use."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque

from fastapi_headroom import catalog
from fastapi_headroom.advice.autosizing import Controller, Decision, Reading

TICK = 0.5


class Pool:
    """A pool under chance arrivals, stepped in milliseconds. Its database serves ``cores`` statements at full speed."""

    def __init__(self, size: int, *, hold: float, cores: float = 1e9, seed: int = 1) -> None:
        self.size, self.hold, self.cores = size, hold, cores
        self.busy = 0.0
        self.rng = random.Random(seed)
        self.now = 0.0
        self.ends: list[float] = []
        self.line: deque[float] = deque()
        self.found = [0.0] * (len(catalog.POOL_DEMAND.buckets) + 1)
        self.served = self.held = 0.0
        self.crowd = 0

    def run(self, rate: float, seconds: float = TICK) -> None:
        """Let time pass under a rate of arrivals; with a ``crowd`` that many are always there, and no rate counts."""
        step = 0.001
        for _ in range(round(seconds / step)):
            self.now += step
            slower = max(1.0, len(self.ends) / self.cores)
            self.ends = [left - step / slower for left in self.ends]
            done = sum(left <= 0 for left in self.ends)
            self.served += done
            self.held += len(self.ends) * step
            self.ends = [left for left in self.ends if left > 0]
            if self.crowd:
                arrivals = self.crowd - len(self.ends) - len(self.line)
            else:
                arrivals = int(self.rng.random() < rate * step)
            for _ in range(arrivals):
                self.found[bisect_left(catalog.POOL_DEMAND.buckets, len(self.ends) + len(self.line))] += 1
                self.line.append(self.now)
            while self.line and len(self.ends) < self.size:
                self.line.popleft()
                self.ends.append(self.rng.uniform(0.8, 1.2) * self.hold)

    def reading(self) -> Reading:
        return Reading(
            self.now, max(self.size, len(self.ends)), len(self.ends), len(self.line), tuple(self.found), self.served,
            self.held, self.busy,
        )  # fmt: skip


def follow(controller: Controller, pool: Pool, rate: float, seconds: float) -> list[Decision]:
    decisions = []
    for _ in range(round(seconds / TICK)):
        pool.run(rate)
        decisions.append(controller.decide(pool.reading()))
        pool.size = decisions[-1].size
    return decisions


def test_a_step_of_load_is_followed_up_within_seconds_and_down_after_the_patience() -> None:
    """1x to 6x and back: up within three seconds, doubling at most; down after the patience, smoothly."""
    controller, pool = Controller(2, 30, 10.0), Pool(2, hold=0.05)
    follow(controller, pool, 20, 30)
    before = pool.size
    assert 2 <= before <= 6
    up = [decision.size for decision in follow(controller, pool, 120, 3)]
    assert up[-1] >= 8
    assert all(after <= max(2 * size, size + 2) for size, after in zip([before, *up], up, strict=False))
    steady = follow(controller, pool, 120, 40)[-30:]
    assert all(8 <= decision.size <= 16 for decision in steady)
    assert not any(decision.held for decision in steady)
    high = pool.size
    follow(controller, pool, 20, 6)
    assert pool.size == high
    down = [decision.size for decision in follow(controller, pool, 20, 60)]
    assert down[-1] <= 6
    assert all(size - after <= max(1, size // 4) for size, after in zip([high, *down], down, strict=False))


def test_a_crowd_gets_a_connection_each() -> None:
    """Twelve callers that come again at once get twelve or, for a bucket's width, one more."""
    controller, pool = Controller(2, 30, 30.0), Pool(2, hold=0.05)
    pool.crowd = 12
    decisions = follow(controller, pool, 0, 90)
    assert 12 <= decisions[4].size <= 13
    assert {decision.size for decision in decisions[-20:]} <= {12, 13}


def test_a_pool_at_its_maximum_says_so_and_stays_there() -> None:
    """With useful connections a trial of fewer comes to an end, and the pool is back at its maximum."""
    controller, pool = Controller(2, 12, 30.0), Pool(2, hold=0.05)
    pool.crowd = 40
    decisions = follow(controller, pool, 0, 120)
    assert [decision.held for decision in decisions].count("maximum") > 200
    assert sum(decision.size == 12 for decision in decisions) > 220
    assert any(decision.reason == "trial" for decision in decisions)


def test_a_pool_does_not_grow_where_the_database_is_what_is_short() -> None:
    """A database that serves four at full speed: forty callers do not make the pool keep its maximum of 30."""
    controller, pool = Controller(2, 30, 30.0), Pool(2, hold=0.05, cores=4)
    pool.crowd = 40
    follow(controller, pool, 0, 60)
    sizes = [decision.size for decision in follow(controller, pool, 0, 300)]
    assert sum(sizes) / len(sizes) < 10
    served = pool.served
    follow(controller, pool, 0, 20)
    assert pool.served - served > 0.9 * 20 * 4 / 0.05, "and serves as much as with thirty"


def test_a_pool_does_not_grow_while_there_is_no_cpu() -> None:
    """With the process busy all the time the size stays, and what holds it back is told."""
    controller, pool = Controller(2, 30, 30.0), Pool(4, hold=0.05)
    pool.crowd, pool.busy = 20, 0.97
    decisions = follow(controller, pool, 0, 20)
    assert {decision.size for decision in decisions} == {4}
    assert decisions[-1].held == "cpu"
    assert 20 <= decisions[-1].wanted <= 21
    pool.busy = 0.3
    assert 20 <= follow(controller, pool, 0, 5)[-1].size <= 21


def test_without_cpu_a_pool_still_grows_to_what_a_fixed_size_would_be() -> None:
    """A starved process holds connections for longer; it is not turned away at the minimum for that."""
    controller, pool = Controller(2, 30, 30.0, enough=8), Pool(2, hold=0.05)
    pool.crowd, pool.busy = 20, 0.97
    decisions = follow(controller, pool, 0, 5)
    assert (decisions[-1].size, decisions[-1].held) == (8, "cpu")


def test_counters_that_begin_anew_are_no_demand() -> None:
    """After another store is written to, the size stays instead of following a negative rate."""
    controller, pool = Controller(2, 30, 5.0), Pool(4, hold=0.05)
    follow(controller, pool, 40, 10)
    pool.found = [0.0] * len(pool.found)
    pool.served = pool.held = 0.0
    assert follow(controller, pool, 40, 1)[-1].size <= 8
