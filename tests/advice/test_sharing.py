"""A budget is divided so that all workers come to the same result and nobody is left below its floor."""

from __future__ import annotations

import random

from fastapi_headroom.advice.sharing import shares


def test_the_smallest_asks_are_met_first_and_the_rest_is_divided_evenly() -> None:
    """Of 16, one that asks for 2 gets 2 and two that ask for all get 7 each; what does not divide goes to the first."""
    assert shares([1, 1, 1], [16, 2, 16], 16) == [7, 2, 7]
    assert shares([1, 1, 1], [16, 1, 16], 16) == [8, 1, 7]
    assert shares([2, 2], [3, 4], 16) == [3, 4]
    assert shares([4, 1], [4, 20], 10) == [4, 6]
    assert shares([], [], 5) == []


def test_floors_come_before_what_others_would_like() -> None:
    """A floor is met even if the others' share is smaller; floors that exceed the budget are divided as well."""
    assert shares([6, 1, 1], [6, 9, 9], 10) == [6, 2, 2]
    assert shares([4, 4, 4], [9, 9, 9], 7) == [3, 2, 2]
    assert shares([2, 2, 2], [2, 2, 2], 2) == [1, 1, 0]


def test_no_division_breaks_its_promises() -> None:
    """For 2,000 random sets: never over the budget nor over an ask, nothing left over, and nobody envies anybody."""
    rng = random.Random(1)
    for _ in range(2_000):
        floors = [rng.randint(1, 5) for _ in range(rng.randint(1, 9))]
        asks = [floor + rng.randint(0, 30) for floor in floors]
        budget = rng.randint(1, 120)
        given = shares(floors, asks, budget)
        assert sum(given) == min(budget, sum(asks))
        assert all(got <= ask for got, ask in zip(given, asks, strict=True))
        if sum(floors) > budget:
            floors = [0] * len(floors)
        assert all(got >= floor for got, floor in zip(given, floors, strict=True))
        for got, ask in zip(given, asks, strict=True):
            if got < ask and sum(floors):
                assert all(other <= max(got + 1, floor) for other, floor in zip(given, floors, strict=True))
