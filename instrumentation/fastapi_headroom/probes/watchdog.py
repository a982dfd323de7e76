"""The watchdog: a thread that notices a late heartbeat, looks at the stuck stack, and says who held the loop.

It counts while the block lasts, so an alert fires during the block, and accounts afterwards for what it could not
see: a call that keeps the GIL stops this thread too.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blame import UNKNOWN, Cause, Evidence, Sample, cause_of, look_at, most_common
from fastapi_headroom.probes.pulse import Beat, Clocks, Ended, Pulse
from fastapi_headroom.store.writer import Counter, Writer

log = logging.getLogger("fastapi_headroom")

LONG_TURN: Final = 0.05
"""Seconds for which Python code never keeps the GIL from another thread, whose turn comes after 5 ms or so."""
SITES: Final = 50
"""Sites that get series of their own; later ones are ``other``."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two log records about blocks; the second tells how many came between."""
STILL_BLOCKED: Final = 5.0
"""Seconds after which a block is logged although it lasts: it may never end."""
THREADS_INTERVAL: Final = 1.0
"""Seconds between two looks at the CPU time of every thread, to find who keeps the GIL."""
MOST_SAMPLES: Final = 50
"""Latest samples of a block that are kept."""
MOST_THREADS: Final = 64
"""Threads whose CPU time is looked at."""


class Watchdog(threading.Thread):
    """Watches one loop until ``stop``."""

    def __init__(self, pulse: Pulse, writer: Writer, guard: Guard, threshold: float) -> None:
        super().__init__(name="headroom-watchdog", daemon=True)
        self.pulse, self._writer, self._guard, self._threshold = pulse, writer, guard, threshold
        self._tick = min(max(threshold / 5, 0.004), 0.02)
        self._long_turn = min(LONG_TURN, threshold / 2)
        self._stopped = False
        self._sites: set[str] = set()
        # About the block that may be going on; _settle clears them.
        self._beat: Beat | None = None
        self._finished: Beat | None = None
        self._late = 0.0
        self._samples: list[Sample] = []
        self._elsewhere: dict[int, Sample] = {}
        self._culprit: Sample | None = None
        self._counted: dict[tuple[str, Cause], float] = {}
        self._waits_for_lock: bool | None = None
        self._still_logged = False
        # Looked at once a second.
        self._threads: dict[int, float] = {}
        self._ready = 0.0
        self._threads_due = 0.0
        self._logged_at = float("-inf")
        self._unlogged = 0

    def stop(self) -> None:
        """End the thread within one tick. Idempotent."""
        self._stopped = True
        if self.is_alive() and threading.current_thread() is not self:
            self.join(1.0)

    def run(self) -> None:
        """Look at the heartbeat each tick."""
        own = procfs.ThreadStat(threading.get_native_id())
        before = time.monotonic()
        while not self._stopped:
            time.sleep(self._tick)
            now = time.monotonic()
            try:
                self._look(now, max(0.0, now - before - self._tick), own)
            except Exception as error:
                self._guard.failed(error)
                time.sleep(1.0)  # whatever it was, do not spin on it
                now = time.monotonic()
            before = now
        own.close()

    def _look(self, now: float, waited: float, own: procfs.ThreadStat) -> None:
        """``waited`` is how long this thread itself wanted to run and could not, in seconds."""
        pulse = self.pulse
        beat = pulse.beat
        # Half way to a block: look now, or a short one would be over before it was seen. And before anything else:
        # every system call gives the GIL away, and the code that has just let go of it would run on.
        suspect = now - beat.due >= self._threshold / 2
        sample = self._sample(waited) if suspect or waited >= self._long_turn else None
        if waited >= self._long_turn:
            self._late += max(0.0, waited - (_ready(own) - self._ready))  # for want of a CPU it may wait, too
        while pulse.ended:
            finished = pulse.ended.popleft()
            if sample is not None and finished.beat is beat:
                self._note(beat, sample)
            self._finish(finished)
            self._finished = finished.beat
        if not pulse.loop.is_running():
            pulse.paused = True
        elif suspect and beat is not self._finished:
            if sample is not None:
                self._note(beat, sample)
            if beat.is_block(now, self._threshold):
                self._go_on(beat, now)
            return
        self._settle()
        if now >= self._threads_due:
            self._threads_due = now + THREADS_INTERVAL
            self._threads = _cpu_of_threads()
            self._ready = _ready(own)

    def _settle(self) -> None:
        """All is well: forget what belongs to no block, or to one that is over."""
        self._late = 0.0
        self._elsewhere = {}
        if self._beat is not None:
            self._beat = self._culprit = self._waits_for_lock = None
            self._samples.clear()
            self._counted.clear()
            self._still_logged = False

    def _sample(self, waited: float) -> Sample | None:
        """Look at the loop's stack; after a long wait at all others too, for one of them may have kept the GIL."""
        frames = sys._current_frames()
        if waited >= self._long_turn:
            mine = (self.pulse.ident, self.ident)
            self._elsewhere = {ident: look_at(frame) for ident, frame in frames.items() if ident not in mine}
        frame = frames.get(self.pulse.ident)
        return None if frame is None else look_at(frame, self.pulse.depth, waited)

    def _note(self, beat: Beat, sample: Sample) -> None:
        """Keep a sample of what may become a block."""
        self._beat = beat
        self._samples.append(sample)
        del self._samples[:-MOST_SAMPLES]
        number = self.pulse.thread.system_call()
        if number is not None and procfs.FUTEX is not None:
            self._waits_for_lock = number == procfs.FUTEX

    def _go_on(self, beat: Beat, now: float) -> None:
        """Count the block so far."""
        seconds = now - beat.began
        site, cause = self._verdict(beat.clocks, self.pulse.clocks(now))
        self._count(site, cause, seconds)
        if seconds >= STILL_BLOCKED and not self._still_logged:
            self._still_logged = True
            self._log("is still blocked after", seconds, site, cause)

    def _finish(self, ended: Ended) -> None:
        """Count what is left of a block that is over."""
        if ended.beat is not self._beat:  # too short to be seen, or this thread was stopped as well
            late, elsewhere = self._late, self._elsewhere
            self._settle()
            self._late, self._elsewhere = late, elsewhere
            self._beat = ended.beat
        seconds = ended.clocks.at - ended.beat.began
        site, cause = self._verdict(ended.beat.clocks, ended.clocks)
        self._count(site, cause, seconds)
        self._writer.counter(catalog.LOOP_BLOCKS, site, cause).inc()
        self._log("was blocked for", seconds, site, cause)
        self._settle()

    def _count(self, site: str, cause: Cause, seconds: float) -> None:
        """Bring what is counted for this block up to ``seconds``."""
        rest = seconds - sum(self._counted.values())
        if rest > 0:
            self._counted[site, cause] = self._counted.get((site, cause), 0.0) + rest
            self._counter(site, cause).inc(rest)

    def _counter(self, site: str, cause: Cause) -> Counter:
        self._writer.counter(catalog.LOOP_BLOCKS, site, cause)  # both series are there from the start
        return self._writer.counter(catalog.LOOP_BLOCKED, site, cause)

    def _verdict(self, before: Clocks, after: Clocks) -> tuple[str, Cause]:
        evidence = Evidence(
            wall=after.at - before.at,
            cpu=after.cpu - before.cpu,
            ready=after.ready - before.ready,
            process_cpu=after.process - before.process,
            watchdog_late=self._late,
            collecting=after.collecting - before.collecting,
            waits_for_lock=self._waits_for_lock,
        )
        cause = cause_of(evidence, self._samples)
        if cause == "starved":
            return UNKNOWN, cause
        site = self._busiest_site(evidence.wall / 4) if cause == "gil" else most_common(self._samples)
        if site not in self._sites:
            if len(self._sites) >= SITES:
                return "other", cause
            self._sites.add(site)
        return site, cause

    def _busiest_site(self, least: float) -> str:
        """Return the site of the thread that used most CPU since the last look at all; at least ``least`` seconds."""
        now = _cpu_of_threads()
        for thread in threading.enumerate():
            sample = self._elsewhere.get(thread.ident or 0)
            if sample is None or thread.native_id is None:
                continue
            used = now.get(thread.native_id, 0.0) - self._threads.get(thread.native_id, 0.0)
            if used > least:
                least, self._culprit = used, sample
        return UNKNOWN if self._culprit is None else self._culprit.site

    def _log(self, what: str, seconds: float, site: str, cause: Cause) -> None:
        now = time.monotonic()
        if now - self._logged_at < LOG_INTERVAL:
            self._unlogged += 1
            return
        self._logged_at = now
        more = f" ({self._unlogged} more since the last record)" if self._unlogged else ""
        self._unlogged = 0
        sample = self._culprit or next((s for s in reversed(self._samples) if s.site == site != UNKNOWN), None)
        route = f" while serving {sample.route}" if sample is not None and sample.route else ""
        stack = "".join(f"\n    {line}" for line in sample.stack) if sample is not None else ""
        log.warning(
            "fastapi-headroom: the event loop %s %.3f s by %s (%s)%s%s%s",
            *(what, seconds, site, cause, route, more, stack and f"; innermost first:{stack}"),
        )


def _ready(thread: procfs.ThreadStat) -> float:
    times = thread.times()
    return 0.0 if times is None else times[1]


def _cpu_of_threads() -> dict[int, float]:
    """Return the CPU seconds of the Python threads by native id; of none where the system does not tell."""
    found: dict[int, float] = {}
    for thread in threading.enumerate()[:MOST_THREADS]:
        if thread.native_id is not None:
            stat = procfs.ThreadStat(thread.native_id)
            times = stat.times()
            stat.close()
            if times is not None:
                found[thread.native_id] = times[0]
    return found
