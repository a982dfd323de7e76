"""The advised size against a simulated pool: the smallest size that keeps p95 waits under the target."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_headroom import catalog
from fastapi_headroom.advice.erlang import erlang_b, erlang_c, erlang_tails
from fastapi_headroom.advice.histogram import Histogram
from fastapi_headroom.advice.littles_law import LARGEST, TARGET, Window, advise, demand_of, smallest
from tests.advice.simulated import (
    Checkout,
    bursts,
    crowd,
    histogram,
    p95,
    poisson,
    run,
    smallest_size,
    steady,
    take,
    window,
)

SECONDS = 120.0
Made = Callable[[random.Random], list[Checkout]]


def exponential(mean: float, rng: random.Random) -> Callable[[], float]:
    return lambda: rng.expovariate(1 / mean)


def long_tail(rng: random.Random) -> Callable[[], float]:
    return lambda: rng.expovariate(1 / 0.01) if rng.random() < 0.95 else rng.expovariate(1 / 0.8)


WORKLOADS: dict[str, Made] = {
    "chance": lambda rng: take(poisson(100, rng), exponential(0.05, rng), SECONDS),
    "chance, holds all alike": lambda rng: take(poisson(100, rng), lambda: 0.05, SECONDS),
    "clockwork": lambda rng: take(steady(80, rng), lambda: 0.05, SECONDS),
    "clockwork, holds by chance": lambda rng: take(steady(80, rng), exponential(0.05, rng), SECONDS),
    "bursts of 20": lambda rng: take(bursts(10, 20, rng), lambda: 0.05, SECONDS),
    "bursts of 10, one after the other": lambda rng: take(bursts(100, 10, rng), exponential(0.05, rng), SECONDS),
    "bursts of short holds": lambda rng: take(bursts(100, 5, rng), lambda: 0.008, SECONDS),
    "long tail": lambda rng: take(poisson(60, rng), long_tail(rng), SECONDS),
    "mixed routes": lambda rng: take(poisson(120, rng), lambda: rng.choice((0.005, 0.005, 0.03, 0.1)), SECONDS),
    "many short": lambda rng: take(poisson(600, rng), exponential(0.004, rng), SECONDS / 4),
    "few long": lambda rng: take(poisson(2, rng), exponential(1.5, rng), SECONDS * 5),
    "large": lambda rng: take(poisson(400, rng), exponential(0.1, rng), SECONDS / 2),
}


def fits(checkouts: list[Checkout], size: int) -> bool:
    """The acceptance of the advice: enough, and three quarters is not; or within one of the smallest that is enough."""
    best = smallest_size(checkouts, TARGET)
    enough = p95(run(checkouts, size)[0]) <= TARGET
    return abs(size - best) <= 1 or (enough and p95(run(checkouts, max(1, int(0.75 * size)))[0]) > TARGET)


@pytest.mark.parametrize("times", [2.5, 1.5, 1.0])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_pool_that_is_large_enough_is_sized_by_what_it_needs(name: str, times: float) -> None:
    """Watched at 1 to 2.5 times the best size, the advice passes whatever the workload, and does not copy the size."""
    checkouts = WORKLOADS[name](random.Random(1))
    size = round(times * smallest_size(checkouts, TARGET))
    advice = advise(window(checkouts, *run(checkouts, size), size))
    assert advice is not None
    assert fits(checkouts, advice.size), (size, advice.size, smallest_size(checkouts, TARGET))


@pytest.mark.parametrize("times", [0.75, 0.6, 0.4])
@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith(("clockwork", "bursts"))])
def test_a_pool_that_is_too_small_does_not_hide_the_demand(name: str, times: float) -> None:
    """Watched at 0.75 to 0.4 times the best size, where checkouts wait or pile up, the advice is the same."""
    checkouts = WORKLOADS[name](random.Random(1))
    size = max(1, int(times * smallest_size(checkouts, TARGET)))
    advice = advise(window(checkouts, *run(checkouts, size), size))
    assert advice is not None
    assert fits(checkouts, advice.size), (size, advice.size, smallest_size(checkouts, TARGET))


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.startswith(("clockwork", "bursts"))])
def test_advice_from_a_small_pool_with_odd_arrivals_settles_when_it_is_followed(name: str) -> None:
    """Bursts and clockwork through too small a pool look like more than they are: enough at once, right at the next."""
    checkouts = WORKLOADS[name](random.Random(1))
    size = max(1, int(0.5 * smallest_size(checkouts, TARGET)))
    first = advise(window(checkouts, *run(checkouts, size), size))
    assert first is not None and p95(run(checkouts, first.size)[0]) <= TARGET
    second = advise(window(checkouts, *run(checkouts, first.size), first.size))
    assert second is not None and fits(checkouts, second.size)


@pytest.mark.parametrize("size", [4, 8, 30])
def test_a_crowd_of_callers_needs_as_many_as_they_are(size: int) -> None:
    """Twenty callers that come again at once need twenty connections: the queue in front of a full pool tells."""
    rng = random.Random(2)
    checkouts, waits, found = crowd(20, size, exponential(0.05, rng), 60)
    advice = advise(window(checkouts, waits, found, size))
    assert advice is not None and 19 <= advice.size <= 24


def test_predicted_waits_are_those_that_come() -> None:
    """At three quarters of the advised size the predicted p95 wait is within a third of the simulated one."""
    checkouts = WORKLOADS["chance"](random.Random(3))
    advice = advise(window(checkouts, *run(checkouts, 20), 20))
    assert advice is not None
    real = p95(run(checkouts, round(0.75 * advice.size))[0])
    assert advice.waits["0.75x"] == pytest.approx(real, rel=0.34)
    assert advice.waits["1x"] <= TARGET
    assert "0.5x" not in advice.waits  # below the load there is no p95: the line grows for ever


def test_the_budget_is_kept() -> None:
    """No more is advised than the database has for each worker, and the predicted wait says what that costs."""
    checkouts = WORKLOADS["chance"](random.Random(1))
    advice = advise(window(checkouts, *run(checkouts, 20), 20), most=7)
    assert advice is not None and advice.size == 7
    assert advice.waits["1x"] > TARGET


def test_nothing_is_said_of_nothing() -> None:
    """No checkouts, or none that came back: no advice rather than a small one."""
    nothing = Histogram(catalog.POOL_USE.buckets, [0] * (len(catalog.POOL_USE.buckets) + 1), 0.0)
    found = Histogram(catalog.POOL_DEMAND.buckets, [0] * (len(catalog.POOL_DEMAND.buckets) + 1), 0.0)
    assert advise(Window(60, nothing, nothing, found, 5)) is None
    assert demand_of(Window(0, nothing, nothing, found, 5)) is None


def test_erlangs_formulas_are_those_of_the_tables() -> None:
    """Values from published Erlang tables; a fraction of a server lies between its neighbours."""
    assert erlang_b(10, 5) == pytest.approx(0.018385, rel=1e-4)
    assert erlang_c(10, 5) == pytest.approx(0.036105, rel=1e-4)
    assert erlang_c(2, 1) == pytest.approx(1 / 3)
    assert erlang_b(1, 2) == pytest.approx(2 / 3)
    assert erlang_c(5, 5) == 1.0
    # three stages of rate 2 in 1 s: exp(-2) * (1 + 2 + 2)
    assert list(islice(erlang_tails(2, 1), 3))[-1] == pytest.approx(0.676676, rel=1e-5)
    assert erlang_b(0.5, 0.5) == pytest.approx(0.603, abs=0.01)


@given(st.floats(0.01, 200), st.floats(0.0, 300))
def test_more_servers_never_block_more(load: float, servers: float) -> None:
    """The continuous form is a probability, and falls as servers are added, also by fractions."""
    here, more = erlang_b(servers, load), erlang_b(servers + 0.3, load)
    assert 0.0 <= more <= here * (1 + 1e-3) <= 1.002


@given(st.integers(1, 300), st.floats(0.1, 1e4), st.floats(0, 10))
def test_a_wait_for_checkins_is_a_probability(stages: int, rate: float, seconds: float) -> None:
    """Numbers that overflow elsewhere still give a share."""
    tails = list(islice(erlang_tails(rate, seconds), stages))
    assert all(0.0 <= tail <= 1.0 for tail in tails)
    assert tails == sorted(tails)


@given(st.integers(1, LARGEST))
def test_the_smallest_size_is_found(wanted: int) -> None:
    """Bisection ends at the first size that fits, from 1 to the largest."""
    assert smallest(lambda size: size >= wanted) == wanted


@given(
    st.lists(st.floats(0, 400), min_size=1, max_size=50),
    st.lists(st.integers(0, 700), min_size=1, max_size=50),
    st.lists(st.floats(0, 60), min_size=1, max_size=50),
    st.integers(1, 100),
    st.floats(0.1, 1e5),
)
def test_whatever_was_counted_the_advice_is_a_size(
    holds: list[float], found: list[int], waits: list[float], limit: int, seconds: float
) -> None:
    """No input of odd shape makes it fail: nothing is said, or a size and waits within their bounds."""
    watched = Window(
        seconds,
        histogram(catalog.POOL_USE, holds),
        histogram(catalog.POOL_WAIT, waits),
        histogram(catalog.POOL_DEMAND, found),
        limit,
    )
    advice = advise(watched)
    if advice is not None:
        assert 1 <= advice.size <= LARGEST
        assert all(0.0 <= wait <= 60.0 for wait in advice.waits.values())


def test_a_histogram_tells_mean_variation_and_shares() -> None:
    """Of what its buckets and sum can tell: exact at bounds, exact for whole numbers one bucket each."""
    found = histogram(catalog.POOL_DEMAND, [0, 0, 1, 3])
    assert dict(found.whole_numbers()) == {0: 0.5, 1: 0.25, 3: 0.25}
    assert (found.mean, found.highest()) == (1.0, 3.0)
    assert found.spread() == pytest.approx(1.5)
    rng = random.Random(4)
    for mean in (0.004, 0.05, 0.3, 2.0):
        holds = histogram(catalog.POOL_USE, [rng.expovariate(1 / mean) for _ in range(20_000)])
        assert holds.variation() == pytest.approx(1.0, abs=0.15)
        assert histogram(catalog.POOL_USE, [mean] * 10).variation() < 0.2
    waits = histogram(catalog.POOL_WAIT, [0.001, 0.009, 0.02, 0.3])
    assert waits.share_above(0.01) == 0.5
    assert waits.share_above(1.0) == 0.0
