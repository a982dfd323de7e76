"""How long the oldest job of a queue has been ready, by what the job tells or else by when it was first seen."""

from __future__ import annotations

from collections.abc import Callable, Hashable


class OldestAges:
    """The ages of the oldest jobs of some queues; a job is asked once for its time."""

    def __init__(self) -> None:
        self._ready: dict[str, tuple[Hashable, float]] = {}

    def of(self, queue: str, job: Hashable | None, told: Callable[[], float | None], now: float) -> float:
        """Return the age in seconds at ``now``, 0 where no job is ready.

        ``job`` tells the oldest job from its followers; ``told`` gives since when it could be run (seconds since
        1970), None where it does not tell: then it ages from this poll.
        """
        if job is None:
            self._ready.pop(queue, None)
            return 0.0
        seen = self._ready.get(queue)
        if seen is None or seen[0] != job:
            ready = told()
            seen = self._ready[queue] = (job, now if ready is None else ready)
        return max(0.0, now - seen[1])
