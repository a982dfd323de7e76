"""A limit on how many names a label may take."""

from __future__ import annotations

from typing import Final

OTHER: Final = "_OTHER"
"""What all names beyond the limit share."""


class BoundedNames:
    """Passes the first ``limit`` different names through and folds the rest into ``_OTHER``."""

    __slots__ = ("_known", "_limit")

    def __init__(self, limit: int = 100) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the name, or ``_OTHER`` when it is one too many."""
        if name in self._known:
            return name
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(name)
        return name
