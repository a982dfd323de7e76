"""Watches every event loop of a process for blocks, for tests: those that run, and those that are started meanwhile.

Needs no ``init``, and takes nothing from the loop probe when there is one: each vigil has heartbeats of its own.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blame import depth_of
from fastapi_headroom.probes.blocks import Block
from fastapi_headroom.probes.heartbeat import Heartbeat
from fastapi_headroom.probes.pulse import Pulse
from fastapi_headroom.probes.watchdog import Watchdog
from fastapi_headroom.store.writer import Writer

INTERVAL: Final = 0.004
"""Mean seconds between two beats: a block is timed to half of that."""
PATIENCE: Final = 10.0
"""Seconds to wait for a loop that is blocked when the vigil ends."""
_OURS: Final = "fastapi_headroom."


class Vigil:
    """Collects the blocks of all loops from ``start`` to ``stop``."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        """Seconds."""
        self.found: list[Block] = []
        self._guard = Guard("loop")
        self._writer = Writer.in_memory()
        self._watched: list[_Watched] = []
        self._lock = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Watch the loops that run, and each that is run from now on."""
        _keeping.append(self)
        _wrap_loops()
        own, running = asyncio._get_running_loop(), _running_loops()  # found before anything is timed: it takes a while
        if own is not None:  # the collector does not know it after a gc.freeze()
            self.watch(own, here=True)
        for loop in running:
            self.watch(loop)

    def stop(self) -> list[Block]:
        """Watch no longer. Return the blocks that lasted for the threshold, time without a CPU left out.

        Waits for a loop that is blocked.
        """
        now = time.monotonic()
        _keeping.remove(self)
        _unwrap_loops()
        with self._lock:
            self._stopped = True
            watched = tuple(self._watched)
        for one in watched:
            one.finish(now)
        return [block for block in self.found if block.seconds - block.starved >= self.threshold]

    def lasts(self, block: Block) -> None:
        """Take note of a block that goes on: nothing yet."""

    def over(self, block: Block) -> None:
        """Keep a block that is over."""
        self.found.append(block)

    def watch(self, loop: asyncio.AbstractEventLoop, *, here: bool = False) -> None:
        """Watch a loop: the one that runs the caller when ``here``, else from its next iteration on."""
        with self._lock:
            if self._stopped or any(one.loop is loop for one in self._watched):
                return
            watched = _Watched(loop, self, self._guard, self._writer, self.threshold)
            self._watched.append(watched)
        if here:
            watched.begin(depth=_depth_below_task())
        else:
            loop.call_soon_threadsafe(watched.begin)


class _Watched:
    """One loop, its heartbeat and its watchdog."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, vigil: Vigil, guard: Guard, writer: Writer, threshold: float
    ) -> None:
        self.loop = loop
        self._vigil, self._guard, self._writer, self._threshold = vigil, guard, writer, threshold
        self._heartbeat: Heartbeat | None = None
        self._watchdog: Watchdog | None = None
        self._ended = False

    def begin(self, depth: int | None = None) -> None:
        """Begin to measure. Runs on the loop, in a callback, or in a task whose frames begin at ``depth``."""
        if self._ended:
            return
        pulse = Pulse(self.loop)
        interval = min(INTERVAL, self._threshold / 4)
        delay = self._writer.histogram(catalog.LOOP_DELAY, self._writer.worker)
        self._heartbeat = Heartbeat(pulse, delay, self._guard, self._threshold, _each_second(pulse), interval)
        self._watchdog = Watchdog(pulse, self._vigil, self._guard, self._threshold)
        self._heartbeat.start(depth)
        self._watchdog.start()
        self._watchdog.watches.wait(1.0)

    def finish(self, now: float) -> None:
        """Stop, once what has happened up to ``now`` is known."""
        self._ended = True
        heartbeat, watchdog = self._heartbeat, self._watchdog
        if heartbeat is None or watchdog is None:
            return
        pulse = watchdog.pulse
        here = self.loop is asyncio._get_running_loop()
        deadline = now + PATIENCE
        while not here and self.loop.is_running() and pulse.beat.clocks.at < now and time.monotonic() < deadline:
            time.sleep(0.001)
        heartbeat.stop()
        watchdog.stop()
        watchdog.settle(until=now if here or self.loop.is_running() else None)
        pulse.close()


def _each_second(pulse: Pulse) -> Callable[[], float]:
    def find() -> float:
        pulse.find_greenlet()
        return 1.0

    return find


_keeping: list[Vigil] = []
_wrapped: dict[Any, tuple[Any, Any]] = {}
"""Class of loops -> what its ``run_forever`` was (None when inherited) and is."""


def _wrap_loops() -> None:
    """Let each loop that is run tell the vigils: asyncio's, and uvloop's if it is imported."""
    classes: tuple[Any, ...] = (asyncio.BaseEventLoop, getattr(sys.modules.get("uvloop"), "Loop", None))
    for cls in classes:
        if cls is not None and cls not in _wrapped:
            wrapper = _announced(cls.run_forever)
            _wrapped[cls] = (vars(cls).get("run_forever"), wrapper)
            cls.run_forever = wrapper


def _unwrap_loops() -> None:
    if _keeping:
        return
    for cls, (original, wrapper) in _wrapped.items():
        if vars(cls).get("run_forever") is not wrapper:
            continue  # somebody wrapped ours: it stays below, and does nothing
        if original is None:
            del cls.run_forever
        else:
            cls.run_forever = original
    _wrapped.clear()


def _announced(run_forever: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(run_forever)
    def announced(loop: Any) -> None:
        for vigil in tuple(_keeping):
            vigil.watch(loop)
        run_forever(loop)

    return announced


def _running_loops() -> list[asyncio.AbstractEventLoop]:
    """Return the loops that run, in whatever thread: nothing else in Python knows them."""
    loops = [found for found in gc.get_objects() if issubclass(type(found), asyncio.AbstractEventLoop)]
    return [loop for loop in loops if loop.is_running()]


def _depth_below_task() -> int:
    """Return the number of frames below the running task's: those of whoever runs the loop."""
    task = asyncio.current_task()
    frame: FrameType | None = getattr(task.get_coro(), "cr_frame", None) if task is not None else None
    outer = frame.f_back if frame is not None else None
    while outer is not None and outer.f_globals.get("__name__", "").startswith(_OURS):
        outer = outer.f_back  # the step driver's
    return depth_of(outer)
