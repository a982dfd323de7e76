"""How workers divide a budget among them, each for itself and all with the same result."""

from __future__ import annotations

from collections.abc import Sequence


def shares(floors: Sequence[int], asks: Sequence[int], budget: int) -> list[int]:
    """Return what each one may have: its floor first, then the rest of what it asks for, the smallest asks first.

    This is max-min fairness: nobody gets more at the cost of one who has less. Nobody gets more than it asks for, and
    the sum is no more than the budget. What does not divide goes to the first ones. Where the floors alone exceed the
    budget, they are divided in the same way.
    """
    if sum(map(min, floors, asks)) > budget:
        floors, asks = [0] * len(floors), [min(floor, ask) for floor, ask in zip(floors, asks, strict=True)]
    low, high = 0, max(asks, default=0)
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(_at(level, floors, asks)) <= budget else (low, level - 1)
    given = _at(low, floors, asks)
    rest = budget - sum(given)
    for place, ask in enumerate(asks):
        if rest > 0 and given[place] == low < ask:
            given[place] += 1
            rest -= 1
    return given


def _at(level: int, floors: Sequence[int], asks: Sequence[int]) -> list[int]:
    return [min(ask, max(floor, level)) for floor, ask in zip(floors, asks, strict=True)]
