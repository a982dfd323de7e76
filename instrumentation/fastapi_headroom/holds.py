"""Who held the event loop lately: the account that tells a wait from being ready while the loop was busy.

A loop that is not idle runs iterations without a pause between them. So it is enough to notice that it has been
busy for LONG; from then on a marker (``call_soon``) notes the start of each iteration, until a few short ones have
passed. While it does, all the time is time in which somebody held the loop: requests, other tasks, callbacks,
libraries. Two tell that the loop is busy: the steps of requests, exactly (see ``driver``), and the heartbeat of the
loop probe, which comes late whoever held the loop, always from 25 ms on (from 45 ms on
while it rests, when nobody is served).

What became ready while the loop was held is run within ITERATIONS of the hold's end: one reads the socket, one runs the
task, one to spare. A hold that ended earlier delayed nothing that is run now.

Nothing here costs the loop anything while it is not held. Times are seconds of ``time.perf_counter``.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from asyncio.events import _get_running_loop
from collections import deque
from contextvars import Context
from time import perf_counter
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

LONG: Final = 0.005
"""Seconds from which on it matters that the loop was held."""
SHORT: Final = 0.0005
"""Seconds from which on a step is looked at. Shorter ones in a row are left to the heartbeat."""
PAUSE: Final = 0.001
"""Seconds between two such steps from which on the loop was idle."""
ITERATIONS: Final = 3
LINGER: Final = 0.05
"""Seconds after a hold in which a new connection that came during it may still be on its way to the app."""
MEMORABLE: Final = 0.02
"""Seconds from which on it is remembered whose step it was that held the loop."""
MOST_REMEMBERED: Final = 8

until = 0.0
"""Up to when a request that starts may have lain in its socket while a loop of this process was held."""


class Step(NamedTuple):
    """A step that held the loop for MEMORABLE or more: from when to when, and the ledger of its request."""

    began: float
    ended: float
    request: Any


class LoopHolds:
    """The holds of one loop. All methods are called on its thread."""

    __slots__ = ("_context", "_quiet", "_ticks", "armed", "began", "earliest", "ended", "steps")

    def __init__(self) -> None:
        self.armed = False
        """True while the loop is known to be busy without a pause."""
        self.began = 0.0
        """Since when it has been, as well as we know. Of steps in a row: the start of the first."""
        self.earliest = 0.0
        """The loop was idle before: no data that came earlier had to wait. Reaches over pauses up to LINGER."""
        self.ended = 0.0
        self.steps: deque[Step] = deque(maxlen=MOST_REMEMBERED)
        """The latest long ones of requests. Read on any thread."""
        self._ticks: deque[float] = deque(maxlen=ITERATIONS + 1)
        self._quiet = 0
        self._context = Context()  # the request in which we are called must not live on in the marker

    def step(self, loop: AbstractEventLoop, start: float, end: float) -> None:
        """Take note of a step of SHORT or more."""
        if self.armed:
            return  # the marker sees how long the iteration is
        if start - self.ended > PAUSE:
            if start - self.ended > LINGER:
                self.earliest = start
            self.began = start
        self.ended = end
        if end - self.began >= LONG:
            self._arm(loop, end)

    def late(self, loop: AbstractEventLoop, due: float, before: float, now: float) -> None:
        """Take note of a heartbeat that is LONG or more late; the loop was free at the one ``before``."""
        guess = (before + due) / 2  # nobody looked in between
        if self.armed and self.began > due + LONG:
            self.began = guess  # a step was seen, but somebody else had held the loop before it
        elif not self.armed:
            if before - self.ended > LINGER:
                self.earliest = before
            self.began = guess
            self._arm(loop, now)
        self.earliest = min(self.earliest, before)

    def held_since(self) -> float | None:
        """Return since when the loop has been held, if what is run now may have waited for that; else None."""
        if not self.armed:
            return None
        ticks = self._ticks
        return ticks[0] if len(ticks) > ITERATIONS else self.began

    def _arm(self, loop: AbstractEventLoop, now: float) -> None:
        self._extend(now)
        self.armed = True
        self._ticks.clear()
        loop.call_soon(self._tick, loop, context=self._context)

    def _extend(self, now: float) -> None:
        global until
        self._quiet = 0
        self.ended = now
        until = now + LINGER

    def _tick(self, loop: AbstractEventLoop) -> None:
        now = perf_counter()
        ticks = self._ticks
        if now - (ticks[-1] if ticks else self.ended) >= LONG:
            self._extend(now)
        else:
            self._quiet += 1
        if self._quiet > ITERATIONS:
            self.armed = False
        else:
            ticks.append(now)
            loop.call_soon(self._tick, loop, context=self._context)


_loops: WeakKeyDictionary[AbstractEventLoop, LoopHolds] = WeakKeyDictionary()


def of_running_loop() -> LoopHolds | None:
    """Return the holds of the loop that runs in this thread, if it was ever held."""
    loop = _get_running_loop()
    return None if loop is None else _loops.get(loop)


def steps_of(loop: AbstractEventLoop) -> tuple[Step, ...]:
    """Return the latest long steps of requests on a loop, oldest first. Safe from any thread."""
    holds = _loops.get(loop)
    return () if holds is None else tuple(holds.steps)


def note_step(start: float, end: float, request: Any = None) -> None:
    """Take note of a step of SHORT or more on the running loop, and of the ledger of its request. Never raises."""
    try:
        loop = _get_running_loop()
        if loop is not None:
            holds = _of(loop)
            holds.step(loop, start, end)
            if request is not None and end - start >= MEMORABLE:
                holds.steps.append(Step(start, end, request))
    except Exception:  # the app's own step has just ended well, or with an error of its own
        pass


def note_late_beat(loop: AbstractEventLoop, late: float, since_beat: float) -> None:
    """Take note of a heartbeat that comes ``late`` seconds late and ``since_beat`` seconds after the one before."""
    if late >= LONG:
        now = perf_counter()
        _of(loop).late(loop, now - late, now - since_beat, now)


def _of(loop: AbstractEventLoop) -> LoopHolds:
    holds = _loops.get(loop)
    if holds is None:
        holds = _loops[loop] = LoopHolds()
    return holds
