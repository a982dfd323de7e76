"""What the watchdog's own thread lacked: a CPU, so that it did not see what ran."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi_headroom.probes.procfs import ThreadStat


@dataclass(frozen=True, slots=True)
class Lack:
    """Seconds since it began for which the watchdog's thread itself was ready and got no CPU."""

    waiting: float = 0.0
    """To look: nobody saw what ran meanwhile."""
    looking: float = 0.0
    """It may have kept the GIL, and so stopped the loop."""


class OwnClock:
    """Tells of one thread, when it wanted to run and did not, how much of that was for want of a CPU.

    The rest was for want of the GIL.
    """

    def __init__(self, native_id: int) -> None:
        self._stat = ThreadStat(native_id)
        self._ready = self.ready()
        self.lack = Lack()

    def ready(self) -> float:
        """Return the seconds since it began in which the thread was ready and had no CPU."""
        times = self._stat.times()
        return 0.0 if times is None else times[1]

    def start_anew(self) -> None:
        """Leave out what has been up to now and was not asked for."""
        self._ready = self.ready()

    def waited(self, seconds: float) -> float:
        """Take note of a wait to look; return how much of it was for want of a CPU."""
        lacked = self._lacked(seconds)
        self.lack = Lack(self.lack.waiting + lacked, self.lack.looking)
        return lacked

    def looked(self, seconds: float) -> None:
        """Take note of a look that took long."""
        self.lack = Lack(self.lack.waiting, self.lack.looking + self._lacked(seconds))

    def close(self) -> None:
        """Release the descriptor. Idempotent."""
        self._stat.close()

    def _lacked(self, most: float) -> float:
        before, self._ready = self._ready, self.ready()
        return max(0.0, min(most, self._ready - before))
