"""The pulse of one event loop: what its heartbeat tells the watchdog, and the clocks that both read."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NamedTuple

from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.blame import Sample, look_at

MOST_ENDED: Final = 1000
"""Blocks that wait to be accounted for; the watchdog comes by every few milliseconds."""
READY_INTERVAL: Final = 0.1
"""Seconds between two looks at the time without a CPU, while the loop is free: reading it is dearer than the rest."""
OLDEST: Final = 2
"""The generation of objects whose collection may take long: it looks at all that there are."""


def _gil_enabled() -> bool:
    ask = getattr(sys, "_is_gil_enabled", None)
    return ask is None or bool(ask())


class Clocks(NamedTuple):
    """Readings in seconds. Only differences mean something."""

    at: float
    """``time.monotonic``."""
    cpu: float
    """The loop's thread on a CPU."""
    ready: float
    """The loop's thread ready to run, but without a CPU."""
    process: float
    """All threads on CPUs."""
    collecting: float
    """The garbage collector on the loop's thread."""
    turns: int = 0
    """Times that the loop's thread was given a CPU; 0 where the system does not tell."""


class Beat(NamedTuple):
    """One beat: the clocks when it ran, and when the next one is due (``time.monotonic``)."""

    clocks: Clocks
    due: float

    @property
    def began(self) -> float:
        """When a block began that delays the next beat: half way between this one and when that is due.

        The loop was free at this beat and not free when the next was due; in between, nobody looked.
        """
        return (self.clocks.at + self.due) / 2

    def is_block(self, now: float, threshold: float) -> bool:
        """Return whether the loop may have been held for ``threshold`` seconds since this beat.

        Counting from the beat misses no block of that length, and takes none for one that is shorter by more than
        the interval of two beats.
        """
        return now - self.clocks.at >= threshold and now - self.due >= threshold / 2


class Ended(NamedTuple):
    """A block that is over: the beat before it, and the clocks when the loop was free again."""

    beat: Beat
    clocks: Clocks


class Collection(NamedTuple):
    """A run of the garbage collector on the loop's thread over all objects."""

    began: float
    """``time.monotonic``."""
    sample: Sample
    """The code that it ran in."""


class Pulse:
    """Written on the loop's thread, read on the watchdog's: every attribute is replaced in one go."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make the pulse of a loop. Call it on the loop's thread."""
        self.loop = loop
        self.ident = threading.get_ident()
        self.thread = procfs.ThreadStat(threading.get_native_id())
        self.depth = 0
        """Frames of whoever runs the loop: at the bottom of every stack."""
        self.paused = False
        """The loop was found not running; how late the next beat is means nothing."""
        self.resting = False
        """The heartbeat comes once a second, and the watchdog sees that the loop is free (see ``rest``)."""
        self.wake: Callable[[], None] | None = None
        """Ends the heartbeat's rest. Run it on the loop."""
        self.ended: deque[Ended] = deque(maxlen=MOST_ENDED)
        self.seen: deque[FrameType | None] = deque()
        """Frames that the watchdog is done with: what they hold is let go of on the loop's thread, as without it."""
        self.cpu_clock = time.pthread_getcpuclockid(self.ident) if hasattr(time, "pthread_getcpuclockid") else None
        """That of the loop's thread, for ``time.clock_gettime``; None where there is none."""
        self._greenlet: Any = None
        self.find_greenlet()
        self.collection: Collection | None = None
        """The last one."""
        self._collection_began = self._collected = 0.0
        self._callback = self._on_collection
        gc.callbacks.append(self._callback)
        now = time.monotonic()
        self.beat = Beat(self.clocks(now), now)
        self._ready_due = now

    def clocks(self, now: float) -> Clocks:
        """Read the clocks at ``now``. Safe from any thread."""
        process = cpu = time.process_time()  # without a clock of the thread, the process's is the next best
        ready, turns = 0.0, 0
        times = self.thread.times()
        if times is not None:
            cpu, ready, turns = times
        exact = self.cpu()  # where the other is brought up to date at ticks
        began = self._collection_began
        collected = self._collected + (now - began if began else 0.0)
        return Clocks(now, cpu if exact is None else exact, ready, process, collected, turns)

    def cpu(self) -> float | None:
        """Return the CPU seconds of the loop's thread, without giving the GIL away; None where nobody knows."""
        try:
            return None if self.cpu_clock is None else time.clock_gettime(self.cpu_clock)
        except OSError:
            return None  # the loop's thread has ended

    def clocks_on_time(self, now: float) -> Clocks:
        """Read the clocks at ``now``, on the loop's thread, when the loop was free: ``ready`` may be of earlier."""
        if now >= self._ready_due or self.cpu_clock is None:
            self._ready_due = now + READY_INTERVAL
            return self.clocks(now)
        return Clocks(now, time.thread_time(), self.beat.clocks.ready, time.process_time(), self._collected)

    def find_greenlet(self) -> None:
        """Remember the greenlet that runs the loop, as soon as somebody uses any. Call it on the loop's thread."""
        module = sys.modules.get("greenlet")
        # Without the GIL a greenlet may be switched to while another thread reads its frames.
        if self._greenlet is None and module is not None and _gil_enabled():
            self._greenlet = module.getcurrent()

    def outer_frame(self) -> FrameType | None:
        """Return the frame that waits for the greenlet that runs now, None when the loop's own one runs."""
        frame = getattr(self._greenlet, "gr_frame", None)
        return frame if isinstance(frame, FrameType) else None

    def close(self) -> None:
        """Detach from the garbage collector, and let go of the greenlet. Idempotent."""
        self._greenlet = None
        self.seen.clear()
        if self._callback in gc.callbacks:
            gc.callbacks.remove(self._callback)
        self.thread.close()

    def _on_collection(self, phase: str, info: dict[str, Any]) -> None:
        if threading.get_ident() != self.ident:
            return
        if phase == "start":
            self._collection_began = time.monotonic()
            if info["generation"] == OLDEST and (frame := sys._getframe().f_back) is not None:
                self._remember_collection(frame)  # there is no frame while the interpreter ends
        elif self._collection_began:
            self._collected += time.monotonic() - self._collection_began
            self._collection_began = 0.0

    def _remember_collection(self, frame: FrameType) -> None:
        """The collector keeps the GIL: when the watchdog can look, it may be over, or run somebody's finalizer."""
        try:
            sample = look_at(frame, self.depth, 0.0, self.outer_frame()).sample
        except RecursionError:
            return  # it may have come at the very limit of the user's code
        self.collection = Collection(self._collection_began, sample)
