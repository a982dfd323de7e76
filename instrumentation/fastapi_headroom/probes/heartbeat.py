"""The heartbeat: calls itself on one loop every 16 milliseconds or so, and records how late it was called.

Waking a process that sleeps costs many times what the beat itself does (150 us on a small virtual machine). So a loop
on which nothing happens is asked half as often, and each beat on time counts twice.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextvars import Context
from random import random
from typing import Final

from fastapi_headroom.holds import note_late_beat
from fastapi_headroom.ledger import in_flight
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blame import depth_of
from fastapi_headroom.probes.pulse import Beat, Clocks, Ended, Pulse
from fastapi_headroom.store.writer import Histogram

INTERVAL: Final = 0.016
"""Mean seconds between two beats; each comes up to a quarter of it sooner or later, so that no load keeps step."""
HELD: Final = 0.0015
"""Seconds from which on a beat is late because the loop was held: timers of a free loop are up to 1 ms late, and a
virtual machine takes up to half a millisecond more to wake."""
QUIET: Final = 0.05
"""Share of the last second up to which the loop's thread may have been on a CPU for the heartbeat to rest."""
AWAKE: Final = 0.002
"""Seconds of CPU since the last beat that end a rest."""
MOST_FILLED: Final = 500
"""Missed beats that are recorded one by one; of a longer block's, several at a time."""


def _name_library() -> None:
    """Say in this context that the loop is asyncio's.

    AnyIO asks sniffio, where that is installed, and sniffio recognises asyncio by the current task: here is none.
    """
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:
        sniffio.current_async_library_cvar.set("asyncio")


def _milliseconds(seconds: float) -> int:
    """Return the whole milliseconds, at least one, of a time that no loop rounds up to a whole millisecond more.

    ``selectors`` hands ``n * 1e-3`` seconds to ``epoll_wait``, which rounds up anew: 9, 13, 18, 26 and 36 milliseconds
    are a hair more as floats, and become 10, 14, 19, 27 and 37.
    """
    whole = max(1, round(seconds * 1e3))
    while whole * 1e-3 * 1e9 > whole * 10**6:
        whole += 1
    return whole


class Heartbeat:
    """Calls itself on one loop and records how late it was called."""

    def __init__(
        self,
        pulse: Pulse,
        delay: Histogram,
        guard: Guard,
        threshold: float,
        each_second: Callable[[], float],
        interval: float = INTERVAL,
        rest: int = 2,
    ) -> None:
        """``interval`` is in seconds; on a loop on which nothing happens, ``rest`` of them lie between two beats."""
        self._interval, self._rest = interval, rest
        self._skips = 1
        """Intervals between the last beat and the next."""
        self._quiet_since: Clocks | None = None
        self._pulse, self._delay, self._guard, self._threshold = pulse, delay, guard, threshold
        self._each_second = each_second
        self._second_due = 0.0
        self._context = Context()  # an own, empty one: the request that started us must not live on in it
        self._context.run(_name_library)
        self._handle: asyncio.TimerHandle | None = None
        self._stopped = False
        self.asleep = 0.0
        """Seconds that the thread slept while it held the loop, up to the last beat."""
        self.worst = 0.0
        """Longest delay since somebody set it to 0."""

    def start(self, depth: int | None = None) -> None:
        """Schedule the first beat. Call it from a callback of the loop; from a task give the frames below its own."""
        self._resume(time.monotonic(), depth_of(sys._getframe(2)) if depth is None else depth)

    def stop(self) -> None:
        """Cancel the next beat. Safe from any thread, and when the loop is closed."""
        self._stopped = True
        if self._handle is not None:
            self._handle.cancel()

    def asleep_until(self, clocks: Clocks) -> float:
        """Return seconds that the thread slept while it held the loop, those of a hold that lasts included."""
        beat = self._pulse.beat
        late = clocks.at - beat.due
        return self.asleep + (max(0.0, late - (clocks.cpu - beat.clocks.cpu)) if late > HELD else 0.0)

    def _resume(self, now: float, depth: int) -> None:
        """Take the loop as free now, whatever came before. ``depth`` is that of the frame that runs its callbacks."""
        self._pulse.paused = False
        self._pulse.depth = depth
        self._schedule(self._pulse.clocks(now), now)

    def _beat(self) -> None:
        if self._stopped:
            return
        now = time.monotonic()
        pulse = self._pulse
        try:
            if pulse.paused:
                self._resume(now, depth_of(sys._getframe(1)))
                return
            before = pulse.beat
            late = max(0.0, now - before.due)
            missed = 0
            if late < HELD:
                clocks = pulse.clocks_on_time(now)
                if self._skips == 1:
                    self._delay.observe(late)
                else:
                    self._delay.observe_many(late, self._skips)
                    if in_flight or clocks.cpu - before.clocks.cpu > AWAKE:
                        self._wake()
            else:
                clocks = pulse.clocks(now)
                note_late_beat(pulse.loop, late, now - before.clocks.at)
                missed = self._record(before, clocks, late)
                self._wake()
            if pulse.seen:
                pulse.seen.clear()
            if late > self.worst:
                self.worst = late
            if now >= self._second_due:
                self._consider_rest(clocks)
                self._second_due = now + 1.0  # also when it fails: not again on each beat
                self._second_due = now + self._each_second()
            self._schedule(clocks, before.due + missed * self._interval)
        except Exception as error:
            self._guard.failed(error)
            self._schedule(pulse.clocks(now), now)

    def _record(self, before: Beat, clocks: Clocks, late: float) -> int:
        """Record a late beat and those that it made the loop miss; return the number of the latter."""
        missed = int(late / self._interval)
        step = 1 + missed // MOST_FILLED
        for filled in range(0, missed + 1, step):
            self._delay.observe_many(late - filled * self._interval, min(step, missed + 1 - filled))
        if self._skips > 1:
            self._delay.observe_many(0.0, self._skips - 1)
        # Not more than passed since the beat before, and only what is not in the CPU's part.
        computed = clocks.cpu - before.clocks.cpu + clocks.ready - before.clocks.ready
        if computed < late / 2:
            self.asleep += max(
                0.0, min((missed + self._skips) * self._interval, clocks.at - before.clocks.at - computed)
            )
        if before.is_block(clocks.at, self._threshold):
            self._pulse.ended.append(Ended(before, clocks))
        return missed

    def _consider_rest(self, clocks: Clocks) -> None:
        """Beat less often from now on if the loop did next to nothing in the last second, and serves nobody."""
        since, self._quiet_since = self._quiet_since, clocks
        if since is not None and not in_flight and clocks.cpu - since.cpu < QUIET * (clocks.at - since.at):
            self._skips = self._rest

    def _wake(self) -> None:
        """Beat as often as ever, for a second at least."""
        self._skips, self._quiet_since = 1, None

    def _schedule(self, clocks: Clocks, since: float) -> None:
        due = since + self._skips * self._interval * (0.75 + 0.5 * random())
        # Loops round timers up to whole milliseconds: ask for those, or the rounding looks like lateness.
        delay = _milliseconds(due - clocks.at) * 1e-3
        self._pulse.beat = Beat(clocks, clocks.at + delay)
        self._handle = self._pulse.loop.call_later(delay, self._beat, context=self._context)
