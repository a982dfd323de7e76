"""What a user allows autosize to do."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastapi_headroom.errors import SettingsError


class Bounds(NamedTuple):
    """What the user allows. Sizes are connections."""

    minimum: int
    maximum: int
    budget: int
    workers: int | None
    patience: float

    @property
    def enough(self) -> int:
        """What a fixed size would be: an even share of the budget, half of the maximum if workers are unknown."""
        share = self.budget // self.workers if self.workers else self.maximum // 2
        return max(self.minimum, min(share, self.maximum))

    def check(self) -> None:
        """Raise SettingsError where the numbers contradict each other."""
        for name, value in (("minimum", self.minimum), ("maximum", self.maximum), ("budget", self.budget)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(f"autosize(): {name}={value!r} must be a whole number of connections, 1 or more")
        if self.minimum > self.maximum:
            raise SettingsError(
                f"autosize(): minimum={self.minimum} is above maximum={self.maximum}; exchange them, or raise maximum"
            )
        if not isinstance(self.patience, int | float) or not 1 <= self.patience <= 3600 or math.isnan(self.patience):
            raise SettingsError(f"autosize(): patience={self.patience!r} must be seconds from 1 to 3600")
        workers = self.workers
        if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
            raise SettingsError(f"autosize(): workers={workers!r} must be a whole number, 1 or more")
        if self.budget < (workers or 1) * self.minimum:
            raise SettingsError(
                f"autosize(): budget={self.budget} is less than {workers or 1} workers x minimum={self.minimum}; raise "
                "the budget (and the database's max_connections), or lower the minimum or the number of workers"
            )

    def within(self, expected: int | None) -> Bounds:
        """Return these with the number of workers filled in where it is known. Raises SettingsError."""
        bounds = self._replace(workers=self.workers or expected)
        bounds.check()
        return bounds
