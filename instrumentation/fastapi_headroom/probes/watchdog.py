"""The watchdog: a thread that notices a late heartbeat, looks at the stuck stack, and says who held the loop.

It reports while the block lasts, so an alert fires during the block, and accounts afterwards for what it could not
see: a call that keeps the GIL stops this thread too.

A late heartbeat is no block yet: many short steps make it late as well. A *block* is one step that held the loop,
and what tells one from many is that looks in a row found the same step (see ``blame.Sample.step``).
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Final

from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blame import UNKNOWN, Cause, Evidence, Sample, cause_of, look_at, most_common
from fastapi_headroom.probes.blocks import Block, Reporter, in_flight
from fastapi_headroom.probes.pulse import Beat, Clocks, Ended, Pulse

LONG_TURN: Final = 0.05
"""Seconds for which Python code never keeps the GIL from another thread, whose turn comes after 5 ms or so."""
SHORT_WAIT: Final = 0.002
"""Seconds that a timer may be late by itself."""
THREADS_INTERVAL: Final = 1.0
"""Seconds between two looks at the CPU time of every thread, to find who keeps the GIL."""
CLOSE_LOOKS: Final = 10
"""Looks at a late loop that follow each other quickly, to see whether it goes on to other steps."""
MOST_SAMPLES: Final = 50
"""Latest samples of a block that are kept."""
MOST_THREADS: Final = 64
"""Threads whose CPU time is looked at."""
MOST_RECENT: Final = 64
"""Blocks that are remembered for the spans of the requests that met them."""


class Held:
    """One step that was found running on a late loop, and what is known of it."""

    def __init__(self, sample: Sample | None, began: float, earliest: float, clocks: Clocks) -> None:
        self.step = sample.step if sample is not None else None
        self.began = began
        """Best guess, half way between ``earliest`` and the first moment that it was surely there."""
        self.earliest = earliest
        """The loop did something else then."""
        self.clocks = clocks
        """At that moment or before."""
        self.first = self.last = began
        """Between these it was surely there."""
        self.at_last = clocks
        self.ready = clocks.ready
        """The loop's thread's clock when ``first`` was."""
        self.late = 0.0
        """Seconds that the watchdog could not run meanwhile, for want of the GIL."""
        self.lacked = 0.0
        """Seconds that it could not run for want of a CPU."""
        self.samples: list[Sample] = []
        self.culprit: Sample | None = None
        self.waits_for_lock: bool | None = None
        self.requests = in_flight()
        self.reported = False


class Watchdog(threading.Thread):
    """Watches one loop until ``stop``."""

    def __init__(self, pulse: Pulse, reporter: Reporter, guard: Guard, threshold: float) -> None:
        super().__init__(name="headroom-watchdog", daemon=True)
        self.pulse, self._reporter, self._guard, self._threshold = pulse, reporter, guard, threshold
        self._tick = min(max(threshold / 5, 0.004), 0.02)
        self._suspicious = threshold / 4
        self._long_turn = min(LONG_TURN, threshold / 2)
        self._stopped = self._closes = False
        self.recent: deque[Block] = deque(maxlen=MOST_RECENT)
        # About the late beat that is being looked at; _settle clears them.
        self._beat: Beat | None = None
        self._held: Held | None = None
        self._looks = 0
        self._steps = 0
        self._late = self._lacked = 0.0
        self._finished: Beat | None = None
        self._elsewhere: dict[int, Sample] = {}
        self._ready = 0.0
        # Looked at once a second.
        self._threads: dict[int, float] = {}
        self._threads_due = 0.0

    def stop(self, *, wait: bool = True) -> None:
        """End the thread within one tick; idempotent. Without ``wait`` it closes the pulse, else the caller does."""
        self._closes = not wait
        self._stopped = True
        if wait and self.is_alive() and threading.current_thread() is not self:
            self.join(1.0)

    def run(self) -> None:
        """Look at the heartbeat each tick."""
        own = procfs.ThreadStat(threading.get_native_id())
        self._ready = _ready(own)
        before = time.monotonic()
        while not self._stopped:
            # Close looks tell one long step from many short ones; a long block is not slowed down by more of them.
            tick = self._tick if self._held is None or self._looks > CLOSE_LOOKS else self._tick / 4
            time.sleep(tick)
            now = time.monotonic()
            try:
                self._look(now, max(0.0, now - before - tick), own)
            except Exception as error:
                self._guard.failed(error)
                time.sleep(1.0)  # whatever it was, do not spin on it
                now = time.monotonic()
            before = now
        own.close()
        if self._closes:
            self.pulse.close()

    def blocks(self, began: float, now: float) -> list[Block]:
        """Return the blocks since ``began``, the one that goes on included. Call it on the loop's thread."""
        found = [block for block in tuple(self.recent) if block.ended > began]
        held, beat = self._held, self._beat
        if held is None or beat is None or (found and found[-1].began == held.began):
            return found
        if beat is self.pulse.beat:
            clocks = self.pulse.clocks(now)
        else:
            over = [ended.clocks for ended in tuple(self.pulse.ended) if ended.beat is beat]
            if not over:
                return found
            clocks = over[0]
        if clocks.at > began and self._is_block(held, beat, clocks.at):
            found.append(self._judge(held, clocks))
        return found

    def settle(self, until: float | None = None) -> None:
        """Report what is left to be reported. Call it after ``stop``.

        ``until`` is when the step that runs is taken to end; without it, where it was seen last.
        """
        while self.pulse.ended:
            self._finish(self.pulse.ended.popleft())
        held, beat = self._held, self._beat
        if until is not None and held is not None and beat is self.pulse.beat and self._is_block(held, beat, until):
            clocks = self.pulse.clocks(time.monotonic())
            self._report(self._judge(held, clocks._replace(at=max(until, held.last))))
            self._settle()
        self._abandon()

    # ------------------------------------------------------------------ looking
    def _look(self, now: float, waited: float, own: procfs.ThreadStat) -> None:
        """``waited`` is how long this thread itself wanted to run and could not, in seconds."""
        pulse = self.pulse
        beat = pulse.beat
        # A part of the way to a block: look now, or a short one would be over before it was seen. And before anything
        # else: every system call gives the GIL away, and the code that has just let go of it would run on.
        suspect = now - beat.due >= self._suspicious
        sample = self._sample(waited) if suspect or waited >= self._long_turn else None
        if self._stopped and self._held is not None:
            sample = None  # the step has gone on to stop us
        over = pulse.ended[0].beat if pulse.ended else None
        if sample is not None and beat is not self._finished and (over is beat or (suspect and over is None)):
            self._note(beat, sample, now, waited)
        if suspect or waited >= SHORT_WAIT:
            self._explain(waited, own)
        while pulse.ended:
            finished = pulse.ended[0]
            self._finish(finished)
            self._finished = finished.beat
            pulse.ended.popleft()
        if not pulse.loop.is_running():
            pulse.paused = True
            self._abandon()
        elif suspect and beat is not self._finished:
            held = self._held
            if held is not None and self._is_block(held, beat, now):
                held.reported = True
                self._reporter.lasts(self._judge(held, pulse.clocks(now)))
            return
        self._settle()
        if now >= self._threads_due:
            self._threads_due = now + THREADS_INTERVAL
            self._threads = _cpu_of_threads()
            self._ready = _ready(own)

    def _sample(self, waited: float) -> Sample | None:
        """Look at the loop's stack, and at all others too, for one of them may keep the GIL."""
        frames = sys._current_frames()
        mine = (self.pulse.ident, self.ident)
        if waited >= self._long_turn or not self._looks:
            self._elsewhere = {ident: look_at(frame) for ident, frame in frames.items() if ident not in mine}
        frame = frames.get(self.pulse.ident)
        return None if frame is None else look_at(frame, self.pulse.depth, waited, self.pulse.outer_frame())

    def _note(self, beat: Beat, sample: Sample, now: float, waited: float) -> None:
        """Keep a look at what may become a block. No system call comes before the end of this."""
        held = self._held
        if beat is not self._beat or held is None:
            self._looks = self._steps = 0
            held = Held(sample, beat.began, beat.clocks.at, beat.clocks)
            held.first = max(beat.due, now - waited)
        elif held.step != sample.step:
            self._step_over(held, beat, now)
            first = max(held.last, now - waited)
            held = Held(sample, (held.last + first) / 2, held.last, held.at_last)
            held.first = first
            self._steps += 1
        held.last = now
        held.late += waited if waited >= self._long_turn else 0.0
        held.samples.append(sample)
        del held.samples[:-MOST_SAMPLES]
        held.requests |= in_flight()
        self._beat, self._held = beat, held
        self._looks += 1
        number = self.pulse.thread.system_call()
        if number is not None and procfs.FUTEX is not None:
            held.waits_for_lock = bool(held.waits_for_lock) or number == procfs.FUTEX
        held.at_last = self.pulse.clocks(time.monotonic())
        if len(held.samples) == 1 and waited < self._long_turn:
            held.ready = held.at_last.ready

    def _explain(self, waited: float, own: procfs.ThreadStat) -> None:
        """Find out how much of this thread's wait was for want of a CPU, and how much for want of the GIL."""
        ready = _ready(own)
        lacked, self._ready = min(waited, ready - self._ready), ready
        self._lacked += lacked
        if waited >= self._long_turn:
            self._late += waited - lacked
        if (held := self._held) is not None:
            held.lacked += lacked
            if len(held.samples) == 1:
                held.first = min(held.last, held.first + lacked)
            if waited >= self._long_turn and held.samples[-1].waited == waited:
                held.late -= lacked

    # ------------------------------------------------------------------ judging
    def _is_block(self, held: Held, beat: Beat, until: float) -> bool:
        """Return whether a step may have held the loop for the threshold, and surely held it for a part of that.

        Time without a CPU is no part of that: it makes the shortest step a long one.
        """
        if held.reported:
            return True
        if held.earliest == beat.clocks.at:
            long = beat.is_block(until, self._threshold)
        else:
            long = until - held.earliest >= self._threshold
        starved = held.at_last.ready - held.ready
        return long and held.last - held.first - starved >= self._threshold / 5

    def _step_over(self, held: Held, beat: Beat, until: float) -> None:
        """Report a step that was a block, when the loop was found in the next one."""
        # The kernel counts a wait for a CPU when it is over, which it was not when we looked last.
        held.at_last = held.at_last._replace(ready=self.pulse.clocks(until).ready)
        if self._is_block(held, beat, until):
            end = held.at_last._replace(at=max(held.last, (held.last + until) / 2))
            self._report(self._judge(held, end))

    def _finish(self, ended: Ended) -> None:
        """Report a block that the beat ended, if it was one."""
        beat, clocks = ended
        if beat is self._beat and self._held is not None:
            self._held.at_last = self._held.at_last._replace(ready=clocks.ready)
        if beat is not self._beat or self._held is None:
            self._unseen(ended)
        elif self._is_block(self._held, beat, clocks.at):
            self._report(self._judge(self._held, clocks))
        elif self._steps == 0:
            self._unseen(ended)
        elif clocks.ready - beat.clocks.ready >= self._threshold / 4:
            self._report(self._starved(beat, clocks))  # else many short steps, of which none is to blame
        self._settle()

    def _unseen(self, ended: Ended) -> None:
        """Report a block that was over when this thread could look, or that stopped this thread as well.

        When a thread got no CPU, no code can be blamed: it may have been many short steps.
        """
        beat, clocks = ended
        held = self._held if self._beat is beat and self._held is not None else None
        if held is None:
            held = Held(None, beat.began, beat.clocks.at, beat.clocks)
            held.late, held.lacked = self._late, self._lacked
        block = self._judge(held, clocks)
        starved = max(held.lacked, block.starved) >= self._threshold / 4
        self._report(self._starved(beat, clocks) if starved else block)

    def _starved(self, beat: Beat, clocks: Clocks) -> Block:
        return Block(beat.began, clocks.at, UNKNOWN, "starved", None, in_flight(), clocks.at - beat.began)

    def _abandon(self) -> None:
        """Report a block after which the loop did not run again."""
        held, beat = self._held, self._beat
        if held is not None and beat is not None and self._is_block(held, beat, held.last):
            self._report(self._judge(held, held.at_last))
        self._settle()

    def _report(self, block: Block) -> None:
        self.recent.append(block)
        self._reporter.over(block)

    def _settle(self) -> None:
        """All is well: forget what belongs to no block, or to one that is over."""
        self._late = self._lacked = 0.0
        self._looks = self._steps = 0
        self._elsewhere = {}
        self._beat = self._held = None

    def _evidence(self, held: Held, before: Clocks, after: Clocks) -> Evidence:
        wall = after.at - before.at
        could_look = max(held.late, wall - held.lacked, 1e-6)
        return Evidence(
            wall=wall,
            cpu=after.cpu - before.cpu,
            ready=after.ready - before.ready,
            process_cpu=after.process - before.process,
            watchdog_late=wall * held.late / could_look,
            collecting=after.collecting - before.collecting,
            waits_for_lock=held.waits_for_lock,
        )

    def _judge(self, held: Held, after: Clocks) -> Block:
        evidence = self._evidence(held, held.clocks, after)
        samples = tuple(held.samples)
        cause: Cause = cause_of(evidence, samples)
        starved = max(0.0, min(evidence.ready, evidence.wall))
        if cause == "starved" and evidence.wall - starved >= self._threshold:
            # It would have been a block with all the CPU that it wanted as well.
            wall = evidence.wall - starved
            late = evidence.watchdog_late * wall / evidence.wall
            cause = cause_of(replace(evidence, wall=wall, ready=0.0, watchdog_late=late), samples)
        site, sample = UNKNOWN, None
        if cause == "gil":
            sample = self._find_culprit(held, evidence.wall / 4)
            site = UNKNOWN if sample is None else sample.site
        elif cause != "starved":
            site = most_common(samples)
            sample = next((s for s in reversed(samples) if s.site == site), None)
        return Block(held.began, max(held.began, after.at), site, cause, sample, held.requests | in_flight(), starved)

    def _find_culprit(self, held: Held, least: float) -> Sample | None:
        """Return the thread that used most CPU since the last look at all; at least ``least`` seconds."""
        now = _cpu_of_threads()
        for thread in threading.enumerate():
            sample = self._elsewhere.get(thread.ident or 0)
            if sample is None or thread.native_id is None:
                continue
            used = now.get(thread.native_id, 0.0) - self._threads.get(thread.native_id, 0.0)
            if used > least:
                least, held.culprit = used, sample
        return held.culprit


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
