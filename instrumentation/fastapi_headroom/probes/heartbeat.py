"""The heartbeat: calls itself on one loop every 16 milliseconds or so, and records how late it was called.

On a loop on which nothing happens it rests, and comes once a second (see ``rest``).
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
from fastapi_headroom.probes.rest import Rest, due_after, look_interval
from fastapi_headroom.store.writer import Histogram

INTERVAL: Final = 0.016
"""Mean seconds between two beats; each comes up to a quarter of it sooner or later, so that no load keeps step."""
HELD: Final = 0.0015
"""Seconds from which on a beat is late because the loop was held: timers of a free loop are up to 1 ms late, and a
virtual machine takes up to half a millisecond more to wake."""
QUIET: Final = 0.05
"""Share of the last second up to which the loop's thread may have been on a CPU for the heartbeat to rest."""
UNHELD: Final = 0.15
"""Share of the last second up to which the thread may have slept while it held the loop. Timers that a busy machine
runs late look like that."""
RESTING_INTERVAL: Final = 1.0
"""Seconds between two beats at rest."""
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
        rest: Rest | None = None,
    ) -> None:
        """``interval`` is in seconds. With ``rest``, which the watchdog has as well, it may rest."""
        self._interval, self._rest = interval, rest
        self._quiet_since: tuple[Clocks, float] | None = None
        self._long = False
        """The next beat is one at rest: a second after the last."""
        self._timer_due = self._counted = 0.0
        """At rest: when the timer is due, and up to when beats are recorded."""
        self._pulse, self._delay, self._guard, self._threshold = pulse, delay, guard, threshold
        self._each_second = each_second
        self._second_due = 0.0
        self._context = Context()  # an own, empty one: the request that started us must not live on in it
        self._context.run(_name_library)
        self._handle: asyncio.Handle | None = None
        self._stopped = False
        self.asleep = 0.0
        """Seconds that the thread slept while it held the loop, up to the last beat."""
        self.beats = 0
        """Times that it came."""
        self.worst = 0.0
        """Longest delay since somebody set it to 0."""

        pulse.wake = self._wake if rest is not None else None

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
        self._pulse.paused = self._long = False
        self._pulse.depth = depth
        self._schedule(self._pulse.clocks(now), now)

    def _beat(self) -> None:
        if self._stopped:
            return
        now = time.monotonic()
        pulse = self._pulse
        self.beats += 1
        try:
            if pulse.paused:
                self._resume(now, depth_of(sys._getframe(1)))
                return
            before = pulse.beat
            late = max(0.0, now - before.due)
            stands_for = self._interval
            if self._long:
                late, stands_for = self._after_rest(before, now, late), look_interval(self._threshold)
            missed = 0
            if late < HELD:
                clocks = pulse.clocks_on_time(now)
                self._delay.observe(late)
            else:
                clocks = pulse.clocks(now)
                note_late_beat(pulse.loop, late, now - before.clocks.at)
                missed = self._record(before, clocks, late, stands_for)
                if late >= self._threshold / 4:
                    self._quiet_since = None
            if pulse.seen:
                pulse.seen.clear()
            if late > self.worst:
                self.worst = late
            if now >= self._second_due:
                self._consider_rest(clocks)
                self._second_due = now + 1.0  # also when it fails: not again on each beat
                self._second_due = now + self._each_second()
            self._schedule(clocks, min(now, before.due + missed * self._interval))
        except Exception as error:
            self._guard.failed(error)
            self._long = False
            self._schedule(pulse.clocks(now), now)

    def _record(self, before: Beat, clocks: Clocks, late: float, stands_for: float = INTERVAL) -> int:
        """Record a late beat and those that it made the loop miss; return the number of the latter.

        ``stands_for`` is for how many seconds of the loop's time it speaks.
        """
        missed = int(late / self._interval)
        step = 1 + missed // MOST_FILLED
        for filled in range(0, missed + 1, step):
            self._delay.observe_many(late - filled * self._interval, min(step, missed + 1 - filled))
        # Not more than passed since the beat before, and only what is not in the CPU's part.
        computed = clocks.cpu - before.clocks.cpu + clocks.ready - before.clocks.ready
        if computed < late / 2:
            held = missed * self._interval + stands_for
            self.asleep += max(0.0, min(held, clocks.at - before.clocks.at - computed))
        if before.is_block(clocks.at, self._threshold):
            self._pulse.ended.append(Ended(before, clocks))
        return missed

    def _after_rest(self, before: Beat, now: float, late: float) -> float:
        """Record the beats that a rest left out, which nobody would have held up; return how late this one is."""
        self._long = False
        by_timer = max(0.0, now - self._timer_due)
        if not (before.is_block(now, self._threshold) and self._was_held(before, now)):
            late = min(late, by_timer)  # a timer that was run in time proves as much as a look
        count = int((now - late - self._counted) / self._interval)
        if count > 0:
            self._delay.observe_many(by_timer if by_timer < HELD else 0.0, count)
        return late

    def _was_held(self, before: Beat, now: float) -> bool:
        """Return whether something held the loop since ``before``, though the timer came in time.

        It did, if the timer fell due just when that was over: looks have found it, or the thread computed meanwhile.
        """
        since = 0.0 if self._rest is None else self._rest.held_since
        seen = since > before.clocks.at and now - since >= self._threshold / 4
        return seen or time.thread_time() - before.clocks.cpu >= self._threshold / 2

    def _wake(self) -> None:
        """Beat at once, and as often as ever from then on. Runs on the loop."""
        if self._long and not self._stopped and self._handle is not None:
            self._handle.cancel()
            self._timer_due, self._quiet_since = 0.0, None
            self._handle = self._pulse.loop.call_soon(self._beat, context=self._context)

    def _consider_rest(self, clocks: Clocks) -> None:
        """Rest until the next beat if the loop did next to nothing in the last second, and serves nobody."""
        since, self._quiet_since = self._quiet_since, (clocks, self.asleep)
        if since is None or self._rest is None or not self._rest.possible or in_flight:
            self._long = False
            return
        then, asleep = since
        took = clocks.at - then.at
        self._long = clocks.cpu - then.cpu < QUIET * took and self.asleep - asleep < UNHELD * took

    def _schedule(self, clocks: Clocks, since: float) -> None:
        pulse = self._pulse
        if self._long:
            delay, self._counted = RESTING_INTERVAL, clocks.at
            self._timer_due, due = clocks.at + delay, due_after(clocks.at, self._threshold)
        else:
            pulse.resting = False
            due = since + self._interval * (0.75 + 0.5 * random())
            # Loops round timers up to whole milliseconds: ask for those, or the rounding looks like lateness.
            delay = _milliseconds(due - clocks.at) * 1e-3
            due = clocks.at + delay
        pulse.beat = Beat(clocks, due)
        pulse.resting = self._long
        self._handle = pulse.loop.call_later(delay, self._beat, context=self._context)
