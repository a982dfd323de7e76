"""The loop probe: how late the event loop is, how much of the time it is held, and by whom.

A heartbeat asks the loop to call it every 16 milliseconds or so and sees how late that happens. It is all that runs
on the loop, needs nothing of the loop but ``call_later``, and so works on uvloop as on asyncio.

**Utilization** is the share of time that the loop was held, over the last 15 seconds. Its parts are

* the CPU time of the loop's thread, and the time that it was ready but had no CPU: exact, from the kernel;
* the time that it slept while holding the loop (a blocking call, the GIL held by another thread): estimated from the
  beats that found the loop held. A beat comes at a random moment, so the share of beats that find the loop held is
  the share of time that it is (Poisson arrivals see time averages). Beats that were late because the thread computed
  are in the first part and do not count here.

Timers are exact to a millisecond, so the second part sees each blocking call about 1.5 ms shorter than it is, and
none that is shorter than that.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from contextvars import Context
from typing import ClassVar, Final

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes import blocks
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blocking import BlockingCalls
from fastapi_headroom.probes.blocks import Account
from fastapi_headroom.probes.heartbeat import Heartbeat
from fastapi_headroom.probes.pulse import Pulse
from fastapi_headroom.probes.rest import Rest
from fastapi_headroom.probes.threadpool import Threadpool
from fastapi_headroom.probes.watchdog import Watchdog
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Gauge, Writer

WINDOW: Final = 15.0
"""Seconds that the gauges look back."""
SETTLED: Final = 0.1
"""Seconds after which a loop is measured that follows another: those that live for one request, as a test client's do,
would each pay for a thread."""
TASKS_SHARE: Final = 0.001
"""Share of the loop's time that counting its tasks may take."""


class LoopProbe:
    """Measures one event loop: the one that is running when ``bind`` is called, else that of ``attach``."""

    name: ClassVar[str] = "loop"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.LOOP_DELAY,
        catalog.LOOP_DELAY_MAX,
        catalog.LOOP_UTILIZATION,
        catalog.LOOP_CPU,
        catalog.LOOP_BLOCKED,
        catalog.LOOP_BLOCKS,
        catalog.BLOCKING_CALLS,
        catalog.LOOP_TASKS,
        catalog.THREADPOOL_TOKENS,
        catalog.THREADPOOL_WAIT,
    )

    def __init__(self, settings: Settings) -> None:
        self.guard = Guard(self.name)
        self._threshold = settings.block_threshold
        self._threadpool = Threadpool(self.guard)
        self._blocking = BlockingCalls(self.guard)
        self._writer: Writer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._heartbeat: Heartbeat | None = None
        self._watchdog: Watchdog | None = None
        self._gauges: dict[str, Gauge] = {}
        self._history: deque[tuple[float, float, float]] = deque()
        self._worst: deque[tuple[float, float]] = deque()

    def bind(self, writer: Writer) -> None:
        """Resolve handles, measure AnyIO's threadpool, and attach to the running loop if there is one."""
        self._detach(wait=False)
        self._writer = writer
        self._threadpool.bind(writer)
        self._blocking.bind(writer)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._begin(loop)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure this loop, and no other, once it has run for SETTLED. Safe from any thread; free when it is measured.

        A loop that still runs is not left for another: where several threads run loops, the first is measured.
        """
        if loop is self._loop or self._writer is None or (self._loop is not None and self._loop.is_running()):
            return
        self._detach(wait=False)
        self._begin(loop, SETTLED)

    def _begin(self, loop: asyncio.AbstractEventLoop, settled: float = 0.0) -> None:
        self._loop, self._pid = loop, os.getpid()
        # An empty context: the request in which we are called must not live on in the heartbeat.
        if settled:
            loop.call_soon_threadsafe(loop.call_later, settled, self._start, loop, context=Context())
        else:
            loop.call_soon_threadsafe(self._start, loop, context=Context())

    @property
    def at_rest(self) -> bool:
        """Whether next to nothing happens on the loop: it serves nobody, and its heartbeat rests (see ``rest``)."""
        watchdog = self._watchdog
        return watchdog is not None and watchdog.pulse.resting

    def sample(self) -> None:
        """Write the gauges of the last seconds."""
        self._blocking.sample()
        heartbeat, watchdog = self._heartbeat, self._watchdog
        if heartbeat is None or watchdog is None or watchdog.pulse.paused:
            return
        clocks = watchdog.pulse.clocks(time.monotonic())
        asleep = heartbeat.asleep_until(clocks)
        history = self._history
        history.append((clocks.at, clocks.cpu, clocks.cpu + clocks.ready + asleep))
        while len(history) > 2 and history[1][0] <= clocks.at - WINDOW:
            history.popleft()
        at, cpu, held = history[0]
        elapsed = clocks.at - at
        if elapsed > 0:
            self._set(catalog.LOOP_CPU, min(1.0, (clocks.cpu - cpu) / elapsed))
            self._set(catalog.LOOP_UTILIZATION, min(1.0, max(0.0, (history[-1][2] - held) / elapsed)))
        worst, heartbeat.worst = heartbeat.worst, 0.0
        self._worst.append((clocks.at, max(worst, clocks.at - watchdog.pulse.beat.due)))
        while self._worst[0][0] < clocks.at - WINDOW:
            self._worst.popleft()
        self._set(catalog.LOOP_DELAY_MAX, max(seconds for _, seconds in self._worst))

    def close(self) -> None:
        """Stop the heartbeat and the watchdog and put AnyIO's entry back."""
        self._detach(wait=True)
        self._threadpool.close()
        self._blocking.close()
        self._writer = None

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to measure. Runs on the loop."""
        writer = self._writer
        if writer is None or loop is not self._loop or self._heartbeat is not None:
            return  # closed, or another loop was attached meanwhile, or this one once more
        try:
            pulse = Pulse(loop)
            delay = writer.histogram(catalog.LOOP_DELAY, writer.worker)
            rest = Rest(pulse, self._threshold)
            heartbeat = Heartbeat(pulse, delay, self.guard, self._threshold, self._each_second, rest=rest)
            heartbeat.start()
            account, on_file = Account(writer, self._threshold), self._blocking.found_in_file
            watchdog = Watchdog(pulse, account, self.guard, self._threshold, on_file, rest)
            watchdog.start()
            blocks.since = watchdog.blocks
            self._heartbeat, self._watchdog = heartbeat, watchdog
            self.sample()
        except Exception as error:
            self.guard.failed(error)

    def _detach(self, *, wait: bool) -> None:
        """Leave the loop. Without ``wait`` the watchdog ends by itself: the loop's thread is not held up."""
        heartbeat, watchdog = self._heartbeat, self._watchdog
        self._loop = self._heartbeat = self._watchdog = None
        self._gauges.clear()
        self._history.clear()
        self._worst.clear()
        if heartbeat is not None and self._pid == os.getpid():  # after a fork, the parent's loop is not ours to touch
            heartbeat.stop()
        if watchdog is not None:
            if blocks.since == watchdog.blocks:
                blocks.since = None
            watchdog.stop(wait=wait)
            if wait or not watchdog.is_alive():
                watchdog.pulse.close()

    def _each_second(self) -> float:
        """Write what only the loop's own thread can read safely; return seconds until that is due again."""
        loop = self._loop
        if loop is None:
            return 1.0
        began = time.perf_counter()
        if self._watchdog is not None:
            self._watchdog.pulse.find_greenlet()
        self._set(catalog.LOOP_TASKS, len(asyncio.all_tasks(loop)))
        self._threadpool.sample()
        return max(1.0, (time.perf_counter() - began) / TASKS_SHARE)

    def _set(self, metric: Metric, value: float) -> None:
        gauge = self._gauges.get(metric.name)
        if gauge is None and self._writer is not None:
            gauge = self._gauges[metric.name] = self._writer.gauge(metric, self._writer.worker)
        if gauge is not None:
            gauge.set(value)
