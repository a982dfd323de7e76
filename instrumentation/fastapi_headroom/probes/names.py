"""A limit on how many names a label may take."""

from __future__ import annotations

from typing import Final

OTHER: Final = "_OTHER"
"""What all names beyond the limit share."""


class BoundedNames:
    """Passes the first ``limit`` different names through and folds the rest into ``other``."""

    __slots__ = ("_known", "_limit", "_other")

    def __init__(self, limit: int = 100, other: str = OTHER) -> None:
        self._limit = limit
        self._other = other
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the name, or ``other`` when it is one too many."""
        if name in self._known:
            return name
        if len(self._known) >= self._limit:
            return self._other
        self._known.add(name)
        return name
