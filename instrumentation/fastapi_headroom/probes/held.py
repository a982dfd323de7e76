"""One step of the loop that may be a block: the proof that it is one and the same, and how long it ran of itself.

Two looks found the same step when they found the same frame at its bottom, which is kept for that: no other can have
its place meanwhile. A coroutine's frame lives on from step to step, so of those a second thing is needed: a marker
(``call_soon``) that was there before the first look has not run yet. A task asks for its next step when one ends, and
is run after whatever asked before it. Many short steps can never pass for a long one so, however late anybody looks.

Its *own* time is all that passed, less what passed without a CPU: the time that the loop's thread was ready and did
not run, and the time that our own thread was, while it may have kept the GIL or did not see what ran.
"""

from __future__ import annotations

import sys
import time
from typing import Final

from fastapi_headroom.probes.blame import Look, Sample
from fastapi_headroom.probes.blocks import in_flight
from fastapi_headroom.probes.lack import Lack
from fastapi_headroom.probes.pulse import Beat, Clocks

MOST_SAMPLES: Final = 50
"""Latest samples of a block that are kept."""
SLACK: Final = 0.005
"""Seconds without a CPU before a step was seen that may be of before its time (see ``Pulse.clocks_on_time``)."""


STILL: Final = 0.001
"""Seconds of CPU up to which the loop's thread did nothing but ask for the GIL."""
LEAST_INTERVALS: Final = 5
"""Switch intervals that a sleep must have lasted for one to say whether it was for the GIL."""


class Marker:
    """Told by the loop, in its next iteration, that it has gone on to that."""

    __slots__ = ("passed",)

    def __init__(self) -> None:
        self.passed = False

    def __call__(self) -> None:
        """Take note of it."""
        self.passed = True


class Held:
    """One step that was found running on a late loop. Times are ``time.monotonic``."""

    def __init__(self, look: Look | None, began: float, earliest: float, clocks: Clocks, lack: Lack) -> None:
        """``earliest`` is when the loop did something else, ``clocks`` and ``lack`` are of then or before."""
        self.look = look
        self.began = began
        """Best guess, half way between ``earliest`` and the first moment that it was surely there."""
        self.earliest = earliest
        self.clocks = clocks
        self.first = self.last = began
        """Between these it was surely there."""
        self.at_last = clocks
        self.late = 0.0
        """Seconds for which the GIL was kept from the watchdog meanwhile, in stretches too long for Python code."""
        self.samples: list[Sample] = []
        self.waits_for_lock: bool | None = None
        self.culprit: Sample | None = None
        self.requests = in_flight()
        self.reported = False
        self._lack = self._lack_first = self.lack_last = lack
        self._ready_first = clocks.ready
        self._clocks_first: Clocks | None = None
        self.cpu: float | None = None
        """CPU seconds of the loop's thread at the last look."""
        self._pending = 0.0
        self._running = True
        self._known = False
        if look is not None and look.began is not None:
            exact = look.began - (time.perf_counter() - time.monotonic())
            if exact >= earliest:
                self.began = self.earliest = self.first = exact
                self._known = True

    def is_found_by(self, look: Look, marker: Marker, cpu: float | None = None) -> bool:
        """Return whether a look found this very step.

        ``marker`` was there when it was found before; ``cpu`` are the CPU seconds of the loop's thread. Between two
        steps, as while the loop waits for the GIL to run the next one, it is the same time when neither went on.
        """
        if self.look is None or look.base is not self.look.base:
            return False
        if look.base is None:
            return not marker.passed and cpu is not None and self.cpu is not None and cpu - self.cpu < STILL
        return not (look.resumes and marker.passed)

    def seen(self, sample: Sample, first: float, now: float, cpu: float | None = None) -> None:
        """Take note of a look that found it at ``now``; when it is the first, it was surely there from ``first`` on."""
        self.cpu = cpu
        if not self.samples and not self._known:
            self.first = first
            self.began = (self.earliest + first) / 2
        self.last = now
        self.samples.append(sample)
        del self.samples[:-MOST_SAMPLES]
        self.requests |= in_flight()

    def clocked(self, clocks: Clocks, running: bool, lack: Lack) -> None:
        """Take the clocks that were read after a look that found it. ``running`` is False in a system call."""
        if len(self.samples) == 1:
            self._clocks_first = clocks
            if not self._known:
                self._ready_first = clocks.ready
                self._lack_first = lack
        else:
            self._pending = self.pending(clocks) if running else 0.0
        self._running = running
        self.at_last, self.lack_last = clocks, lack

    def pending(self, clocks: Clocks) -> float:
        """Return seconds for which the loop's thread may have waited for a CPU without the kernel having counted them.

        It counts a wait when that is over. A thread that slept at the last look is taken to have slept on.
        """
        if not self._running:
            return 0.0
        last = self.at_last
        passed = (clocks.at - last.at) - (clocks.cpu - last.cpu) - (clocks.ready - last.ready)
        return max(0.0, self._pending + passed)

    def wakes(self, clocks: Clocks) -> float | None:
        """Return how often the loop's thread woke since the first look, for each time that a wait for the GIL does.

        None when it did not sleep for long enough since, or where the system does not tell.
        """
        first = self._clocks_first
        if first is None or not clocks.turns or not first.turns:
            return None
        asleep = (clocks.at - first.at) - (clocks.cpu - first.cpu) - (clocks.ready - first.ready)
        interval = sys.getswitchinterval()
        return (clocks.turns - first.turns) * interval / asleep if asleep >= LEAST_INTERVALS * interval else None

    def lacked(self, lack: Lack) -> float:
        """Return seconds for which the watchdog got no CPU to look at it."""
        return lack.waiting - self._lack.waiting

    def starved(self, clocks: Clocks, lack: Lack, pending: float = 0.0) -> float:
        """Return seconds up to ``clocks`` in which the loop's thread, for want of a CPU, could not go on."""
        looking = lack.looking - self._lack.looking
        return max(0.0, clocks.ready - self.clocks.ready) + looking + max(pending, 0.0)

    def own(self, clocks: Clocks, lack: Lack, pending: float = 0.0) -> float:
        """Return for how many seconds it ran at most, up to ``clocks``; time without a CPU left out."""
        unseen = lack.waiting - self.lack_last.waiting + self._lack_first.waiting - self._lack.waiting
        starved = max(0.0, self.starved(clocks, lack, pending) - SLACK) + unseen
        return max(clocks.at - self.earliest - starved, clocks.cpu - self.clocks.cpu)

    def surely(self, clocks: Clocks, lack: Lack, pending: float = 0.0) -> float:
        """Return for how many seconds it ran at least. The later the clocks, the more waits for a CPU they tell."""
        starved = max(0.0, clocks.ready - self._ready_first) + lack.looking - self._lack_first.looking + pending
        return self.last - self.first - starved

    def is_block(self, beat: Beat, clocks: Clocks, lack: Lack, threshold: float, pending: float | None = None) -> bool:
        """Return whether it held the loop for ``threshold`` seconds, and surely for a fifth of that.

        ``clocks`` are those of its latest end. Without ``pending`` it goes on, and what is pending is known.
        """
        if self.reported:
            return True
        late = self.earliest > beat.clocks.at or beat.is_block(clocks.at, threshold)
        pending = self._pending if pending is None else pending
        if not late or self.own(clocks, lack, pending) < threshold:
            return False
        return self.surely(clocks, lack, pending) >= threshold / 5
