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
from typing import Final

from fastapi_headroom.ledger import in_flight
from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.pulse import Beat, Clocks, Pulse

LOOK: Final = 0.04
"""Seconds between two looks at a loop whose heartbeat rests, at most."""
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
        self._selector = selector_of(pulse.loop)
        self._proof: Clocks | None = None
        """The clocks when the kernel last said that the loop's thread slept in its ``epoll_wait``."""
        self.held = False
        """The last look found that something held the loop."""

    @property
    def possible(self) -> bool:
        """Whether the kernel tells that the loop's thread waits for the loop's files."""
        return self._selector is not None

    def sleeps_on(self, now: float) -> bool:
        """Return whether the loop's thread has not run since the kernel last said that it slept in its ``epoll_wait``.

        Then it sleeps there still, and that is taken note of. This is what most looks come to, and all they cost.
        """
        pulse, proof = self._pulse, self._proof
        if proof is None or pulse.cpu() != proof.cpu or not pulse.resting:
            return False
        self.held = False
        pulse.beat = Beat(proof._replace(at=now, process=time.process_time()), due_after(now, self._threshold))
        return True

    def goes_on(self, now: float) -> bool:
        """Return whether the loop is free, and take note that it was at ``now``.

        A loop that is not free is ``held``; one that is not free at the next look either rests no more. Nor does one
        whose last proof is too old: two that are less than ``threshold`` apart leave no room for a hold of that length.
        """
        pulse = self._pulse
        beat = pulse.beat
        again, self.held = self.held, False
        if not in_flight and not pulse.paused and pulse.loop.is_running():
            clocks = self._look(now)
            recent = time.monotonic() - beat.clocks.at < 0.8 * self._threshold
            if clocks is not None and recent and clocks.cpu - beat.clocks.cpu < AWAKE:
                if pulse.resting:
                    pulse.beat = Beat(clocks, due_after(now, self._threshold))
                return True
            self.held = clocks is None and self.possible
            if self.held and pulse.resting and pulse.beat is beat and now < beat.due:
                pulse.beat = Beat(beat.clocks, now)  # it was not free when we looked first
            if self.held and not again:
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
        call = pulse.thread.system_call()
        if call is None:
            self._selector = None  # the kernel does not tell: do not try again
            return None
        number, _, arguments = call.partition(" ")
        if number not in procfs.EPOLL_WAITS or arguments.partition(" ")[0] != self._selector:
            return None
        clocks = pulse.clocks(now)
        if clocks.cpu == cpu:
            self._proof = clocks
        return clocks
