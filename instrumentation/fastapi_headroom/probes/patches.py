"""Replacing attributes of other libraries' classes so that they can be put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Patches:
    """The attributes that one probe has replaced.

    A library may wrap what is already wrapped (OpenTelemetry's instrumentors do). Taking our wrapper out from under
    it is impossible, so such a wrapper stays where it is, inert, and is used again by the next ``wrap`` of the same
    attribute: wrapping twice would count everything twice.
    """

    def __init__(self) -> None:
        self._placed: list[tuple[Any, str, Any, Any]] = []
        self._buried: dict[tuple[Any, str], tuple[Any, Any]] = {}

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace ``owner.name`` by ``make(original)``. Raises AttributeError when the class has no such attribute."""
        buried = self._buried.pop((owner, name), None)
        if buried is not None:
            self._placed.append((owner, name, *buried))
            return
        if name not in vars(owner):
            raise AttributeError(f"{owner.__module__}.{owner.__qualname__} has no attribute {name!r} to measure")
        original = vars(owner)[name]
        replacement = make(original)
        setattr(owner, name, replacement)
        self._placed.append((owner, name, original, replacement))

    def restore(self) -> None:
        """Put every original back that nobody has wrapped since. Idempotent."""
        while self._placed:
            owner, name, original, replacement = self._placed.pop()
            if vars(owner).get(name) is replacement:
                setattr(owner, name, original)
            else:
                self._buried[owner, name] = (original, replacement)
