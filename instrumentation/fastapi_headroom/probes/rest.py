"""The rest of a heartbeat: on a loop on which nothing happens, the watchdog sees that it is free instead.

To wake a process that sleeps costs many times what a beat does, and a beat wakes the loop's thread: 62 beats a second
are 1 % of a CPU on a small virtual machine. So after a second in which the loop did next to nothing and served nobody,
the heartbeat comes once a second, and the watchdog asks the kernel every 40 ms in which system call the loop's thread
sleeps. In the loop's own ``epoll_wait`` it is free: that proves as much as a beat that comes on time. Anything else
ends the rest: another system call, a thread that runs, CPU time that was used, a request, and a watchdog that could
not look for so long that a block may have come and gone.

Nothing is asked of a loop but its ``epoll`` descriptor. Where that or the kernel's answer is not to be had, the
heartbeat does not rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from time import monotonic, process_time, sleep
from typing import Final

from fastapi_headroom.ledger import in_flight
from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.pulse import Beat, Clocks, Pulse

LOOK: Final = 0.04
"""Seconds between two looks at a loop whose heartbeat rests, at most."""
SLEEP: Final = 1.0
"""Seconds after which the watchdog sees to other things than the loop."""
AWAKE: Final = 0.002
"""Seconds of CPU between two looks from which on the loop has something to do."""


def look_interval(threshold: float) -> float:
    """Return the seconds between two looks, so that a hold of ``threshold`` is found before its half is over."""
    return min(LOOK, 0.4 * threshold)


def due_after(seconds: float, threshold: float) -> float:
    """Return when the next proof is due after one at ``seconds``: a look's time, and a tenth to spare."""
    return seconds + 1.1 * look_interval(threshold)


def selector_of(loop: asyncio.AbstractEventLoop) -> str | None:
    """Return the descriptor that a loop waits on, as the kernel writes it; None if it has none that we know of."""
    selector = getattr(loop, "_selector", None)
    ask: Callable[[], int] | None = getattr(selector, "fileno", None) or getattr(loop, "_get_backend_id", None)
    try:
        return hex(ask()) if procfs.EPOLL_WAITS and ask is not None else None
    except Exception:
        return None  # a closed loop, or one that is none of asyncio's and uvloop's


class Rest:
    """The watchdog's part of a rest. Used on the watchdog's thread, but for ``possible``."""

    def __init__(self, pulse: Pulse, threshold: float) -> None:
        """Make the part for one loop. Call it on the loop's thread."""
        self._pulse, self._threshold = pulse, threshold
        selector = selector_of(pulse.loop)
        waits = () if selector is None else (f"{number} {selector} ".encode() for number in procfs.EPOLL_WAITS)
        self._waits: tuple[bytes, ...] = tuple(waits)
        """How the kernel's answer begins when the thread waits for the loop's files."""
        self._proof: Clocks | None = None
        """The clocks when the kernel last said that the loop's thread slept in its ``epoll_wait``."""
        self.stopped = False
        """Nobody watches any more: ``sleep`` ends."""
        self.held_since = 0.0
        """When the first of the looks came that found something to hold the loop, up to the last one; else 0."""

    @property
    def held(self) -> bool:
        """Whether the last look found that something held the loop."""
        return self.held_since > 0.0

    @property
    def possible(self) -> bool:
        """Whether the kernel tells that the loop's thread waits for the loop's files."""
        return bool(self._waits)

    def sleep(self) -> tuple[float, float, bool | None]:
        """Sleep for a second, or until the loop is not free, looking every ``look_interval``.

        Return when the last nap was over, how much too long it was, and whether the loop was free then; None when that
        was not looked for. A thread that has not run since the kernel last said that it slept in its ``epoll_wait``
        sleeps there still: most looks come to that. All code and data have left the processor's caches by then, so
        they call as little as can be.
        """
        pulse, proof, clock = self._pulse, self._proof, self._pulse.cpu_clock
        interval, until_due = look_interval(self._threshold), due_after(0.0, self._threshold)
        began = now = monotonic()
        end = began + SLEEP
        free: bool | None = None
        while True:
            sleep(interval)
            began, now = now, monotonic()
            if proof is None or clock is None or self.stopped or not pulse.resting:
                break
            try:
                moved = time.clock_gettime(clock) != proof.cpu
            except OSError:
                break  # the thread has ended
            if moved:
                free = self.goes_on(now)
                proof = self._proof
                if not free or proof is None:
                    break
            else:
                _, cpu, ready, _, collecting, turns = proof
                pulse.beat = Beat(Clocks(now, cpu, ready, process_time(), collecting, turns), now + until_due)
                self.held_since, free = 0.0, True
            if now >= end:
                break
            free = None
        return now, max(0.0, now - began - interval), free

    def goes_on(self, now: float) -> bool:
        """Return whether the loop is free, and take note that it was at ``now``.

        A loop that is not free is ``held``; one that is not free at the next look either rests no more. Nor does one
        whose last proof is too old: two that are less than ``threshold`` apart leave no room for a hold of that length.
        """
        pulse = self._pulse
        beat = pulse.beat
        since, self.held_since = self.held_since, 0.0
        if not in_flight and not pulse.paused and pulse.loop.is_running():
            clocks = self._look(now)
            recent = monotonic() - beat.clocks.at < 0.8 * self._threshold
            if clocks is not None and recent and clocks.cpu - beat.clocks.cpu < AWAKE:
                if pulse.resting:
                    pulse.beat = Beat(clocks, due_after(now, self._threshold))
                return True
            if clocks is None and self.possible:
                self.held_since = since or now
                if pulse.resting and pulse.beat is beat and now < beat.due:
                    pulse.beat = Beat(beat.clocks, now)  # it was not free when we looked first
                if not since:
                    return False
        self.end()
        return False

    def end(self) -> None:
        """Let the heartbeat come as often as ever. Safe from any thread."""
        pulse = self._pulse
        wake = pulse.wake
        pulse.resting = False
        if wake is not None:
            try:
                pulse.loop.call_soon_threadsafe(wake, context=Context())
            except RuntimeError:
                pass  # closed

    def _look(self, now: float) -> Clocks | None:
        """Return the clocks of ``now`` if the loop's thread sleeps in its ``epoll_wait``, else None.

        Each file that is read gives the GIL away, and code that computes gives it back after 5 ms: of a thread that
        does not sleep, nothing more is asked.
        """
        pulse, cpu = self._pulse, self._pulse.cpu()
        self._proof = None
        call = pulse.thread.raw_system_call()
        if not call:
            self._waits = ()  # the kernel does not tell: do not try again
            return None
        if not call.startswith(self._waits):
            return None
        clocks = pulse.clocks(now)
        if clocks.cpu == cpu:
            self._proof = clocks
        return clocks
