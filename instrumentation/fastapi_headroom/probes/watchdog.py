"""The watchdog: a thread that notices a late heartbeat, looks at the stuck stack, and says who held the loop.

It reports while the block lasts, so an alert fires during the block, and accounts afterwards for what it could not
see: a call that keeps the GIL stops this thread too.

A late heartbeat is no block yet: many short steps make it late as well. A *block* is one step that held the loop
(see ``held``). When it cannot be known whether it was one, because this thread got no CPU to look, nobody is blamed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from time import sleep
from typing import Final

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blame import Look, Sample, endpoint_of, look_at, outwards
from fastapi_headroom.probes.blocks import Block, Reporter
from fastapi_headroom.probes.file_calls import FileCalls
from fastapi_headroom.probes.foreign_frames import walking
from fastapi_headroom.probes.held import Held, Marker
from fastapi_headroom.probes.judge import Judge, starved_block
from fastapi_headroom.probes.lack import Lack, OwnClock
from fastapi_headroom.probes.pulse import Beat, Clocks, Ended, Pulse
from fastapi_headroom.probes.rest import Rest

LONG_TURN: Final = 0.05
"""Seconds for which Python code never keeps the GIL from another thread, whose turn comes after 5 ms or so."""
SHORT_WAIT: Final = 0.002
"""Seconds that a timer may be late by itself."""
LEAST_NAP: Final = 0.002
RUNNING: Final = "running"
"""What the kernel says of a thread that is in no system call, or ready to leave one."""
THREADS_INTERVAL: Final = 1.0
"""Seconds between two looks at the CPU time of every thread, to find who keeps the GIL."""
CLOSE_LOOKS: Final = 10
"""Looks at a late loop that follow each other quickly, to see whether it goes on to other steps."""
MOST_RECENT: Final = 64
"""Blocks that are remembered for the spans of the requests that met them."""


class Watchdog(threading.Thread):
    """Watches one loop until ``stop``."""

    def __init__(
        self,
        pulse: Pulse,
        reporter: Reporter,
        guard: Guard,
        threshold: float,
        on_file_call: Callable[[Look, int], None] | None = None,
        rest: Rest | None = None,
    ) -> None:
        """``on_file_call`` is told of each call on a file that holds the loop, with the thread's identifier.

        ``rest`` is that of the heartbeat.
        """
        super().__init__(name="headroom-watchdog", daemon=True)
        self.pulse, self._reporter, self._guard, self._threshold = pulse, reporter, guard, threshold
        self._tick = min(max(threshold / 5, 0.004), 0.02)
        self._suspicious = threshold / 4
        self._long_turn = min(LONG_TURN, threshold / 2)
        self._judge = Judge(threshold, pulse)
        self._rest = Rest(pulse, threshold) if rest is None else rest
        self._on_file_call, self._file_calls = on_file_call, FileCalls()
        self._stopped = self._closes = False
        self.watches = threading.Event()
        """Set once it looks: how long the GIL is kept from it before that, it cannot tell."""
        self.recent: deque[Block] = deque(maxlen=MOST_RECENT)
        # About the late beat that is being looked at; _settle clears them.
        self._beat: Beat | None = None
        self._held: Held | None = None
        self._latest: tuple[Beat, Sample] | None = None
        """What was found last. There at once: whoever had the GIL before runs on while the rest is looked up."""
        self._marker = Marker()
        self._marker.passed = True
        self._looks = self._steps = 0
        self._unclear = False
        """A step was as long as a block, but for want of a CPU, or was looked at too seldom to tell."""
        self._late = 0.0
        self._finished: Beat | None = None
        # About this thread.
        self._own: OwnClock | None = None
        self._lack_settled = Lack()
        self._loop_ready = 0.0
        self._threads_due = 0.0

    def stop(self, *, wait: bool = True) -> None:
        """End the thread within one tick; idempotent. Without ``wait`` it closes the pulse, else the caller does."""
        self._closes = not wait
        self._stopped = self._rest.stopped = True
        if wait and self.is_alive() and threading.current_thread() is not self:
            self.join(1.0)

    def run(self) -> None:
        """Look at the heartbeat whenever the next one may be late, and each tick while it is."""
        own = self._own = OwnClock(threading.get_native_id())
        while not self._stopped:
            self._loop_ready = max(self._loop_ready, self.pulse.beat.clocks.ready)
            if not self.watches.is_set():
                self.watches.set()
            now, waited = time.monotonic(), 0.0
            free: bool | None = None
            try:
                if self.pulse.resting and self._held is None:
                    now, waited, free = self._rest.sleep()
                else:
                    asleep = now
                    nap = self._nap(asleep)
                    sleep(nap)
                    now = time.monotonic()
                    waited = max(0.0, now - asleep - nap)
                if free is None and self.pulse.resting:
                    free = self._rest.goes_on(now)
                if free is None:
                    self._look(now, waited)
                elif free:
                    self._well(now)
                else:
                    now = time.monotonic()
                    self._look(now, waited, suspect=self._rest.held)
            except Exception as error:
                self._guard.failed(error)
                self._rest.end()
                time.sleep(1.0)  # whatever it was, do not spin on it
                now = time.monotonic()
            looked = time.monotonic() - now
            if looked > SHORT_WAIT:
                own.looked(looked)
        own.close()
        if self._closes:
            self.pulse.close()

    def blocks(self, began: float, now: float, step: tuple[float, Ledger] | None = None) -> list[Block]:
        """Return the blocks since ``began``, the one that goes on included. Call it on the loop's thread.

        ``step`` is when the step that runs began, and its request: a call that keeps the GIL lets nobody else see it.
        """
        found = self._known_blocks(began, now)
        if step is None or (found and found[-1].ended > step[0]):
            return found
        beat = self.pulse.beat
        if beat.clocks.at > step[0] or not beat.is_block(now, self._threshold):
            return found  # the loop has gone on since
        latest = self._latest
        sample = latest[1] if latest is not None and latest[0] is beat else None
        # What it called has returned; for whom it was called is still on the stack.
        site = endpoint_of(outwards(sys._getframe()))
        block = self._judge.unseen(beat, self.pulse.clocks(now), step, sample, site)
        if block is not None:
            found.append(block)
        return found

    def _known_blocks(self, began: float, now: float) -> list[Block]:
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
        if clocks.at > began and self._is_block(held, beat, clocks, pending=0.0):
            found.append(self._judge.block(held, clocks, self._lack))
        return found

    def settle(self, until: float | None = None) -> None:
        """Report what is left to be reported. Call it after ``stop``.

        ``until`` is when the step that runs is taken to end; without it, where it was seen last.
        """
        while self.pulse.ended:
            self._finish(self.pulse.ended.popleft())
        held, beat = self._held, self._beat
        if until is not None and held is not None and beat is not None and beat is self.pulse.beat:
            clocks = self.pulse.clocks(time.monotonic())._replace(at=max(until, held.last))
            if self._is_block(held, beat, clocks, pending=0.0):
                self._report(held, clocks)
                self._settle()
        self._abandon()

    @property
    def _lack(self) -> Lack:
        return Lack() if self._own is None else self._own.lack

    # ------------------------------------------------------------------ looking
    def _nap(self, now: float) -> float:
        """Return the seconds until the next look is due."""
        if self._held is not None:
            # Close looks tell one long step from many short ones; a long block is not slowed down by more of them.
            return self._tick if self._looks > CLOSE_LOOKS else self._tick / 4
        remaining = self.pulse.beat.due + self._suspicious - now
        if self.pulse.paused or remaining <= 0:
            return self._tick
        return max(LEAST_NAP, min(remaining, 3 * self._tick))

    def _look(self, now: float, waited: float, suspect: bool = False) -> None:
        """``waited`` is how long this thread itself wanted to run and could not, in seconds."""
        pulse = self.pulse
        beat = pulse.beat
        # A part of the way to a block: look now, or a short one would be over before it was seen. And before anything
        # else: every system call gives the GIL away, and the code that has just let go of it would run on.
        suspect = suspect or now - beat.due >= self._suspicious
        marker = self._marker
        look = self._sample(waited) if suspect or waited >= self._long_turn else None
        cpu = None if look is None else pulse.cpu()
        found = time.monotonic()
        if look is not None:
            self._latest = (beat, look.sample)
        call = None if look is None else pulse.thread.system_call()
        looked = time.monotonic()
        running = pulse.loop.is_running()
        if not running or (self._stopped and self._held is not None):
            look = None  # the step has gone on to stop us
        over = pulse.ended[0].beat if pulse.ended else None
        same = look is not None and self._held is not None and self._held.is_found_by(look, marker, cpu)
        kept = self._explain(waited) if suspect or waited >= SHORT_WAIT else 0.0
        if looked - found >= self._long_turn:
            self._explain(looked - found)  # the question gave the GIL away, and what was found kept it
        if over is beat and self._held is not None and self._beat is beat and not same:
            look = None  # what it found came after the block, as far as anybody can tell
        if look is not None and beat is not self._finished and (over is beat or (suspect and over is None)):
            self._note(beat, look, same, now, found, kept, cpu, call)
            if self._file_calls.lasts(call, same, looked) and self._on_file_call is not None and not look.ours:
                self._on_file_call(look, pulse.ident)
        while pulse.ended:
            finished = pulse.ended[0]
            self._finish(finished)
            self._finished = finished.beat
            pulse.ended.popleft()
        if not running:
            pulse.paused = True
            self._abandon()
        elif suspect and beat is not self._finished:
            held = self._held
            if held is not None and self._is_block(held, beat, held.at_last):
                held.reported = True
                self._reporter.lasts(self._judge.block(held, held.at_last, self._lack))
            return
        self._well(now)

    def _well(self, now: float) -> None:
        """The loop is free: forget what was, and now and then see to the rest."""
        self._settle()
        if now >= self._threads_due:
            self._threads_due = now + THREADS_INTERVAL
            self._judge.look_at_threads()
            if self._own is not None:
                self._own.start_anew()

    def _sample(self, waited: float) -> Look | None:
        """Look at the loop's stack, and at all others too, for one of them may keep the GIL."""
        with walking():
            frames = sys._current_frames()
            mine = (self.pulse.ident, self.ident)
            if waited >= self._long_turn or not self._looks:
                self._judge.elsewhere = {ident: look_at(f).sample for ident, f in frames.items() if ident not in mine}
            frame = frames.get(self.pulse.ident)
            return None if frame is None else look_at(frame, self.pulse.depth, waited, self.pulse.outer_frame())

    def _mark(self) -> None:
        """Let the loop tell when it goes on to another iteration, and see that the step is there after that."""
        held, pulse = self._held, self.pulse
        if not self._marker.passed or held is None or held.look is None:
            return
        self._marker = Marker()
        try:
            pulse.loop.call_soon_threadsafe(self._marker, context=Context())
        except RuntimeError:
            return  # closed
        if held.look.resumes:
            again = self._sample(0.0)
            if again is None or again.base is not held.look.base:
                self._forget()

    def _explain(self, waited: float) -> float:
        """Find out how much of this thread's wait was for want of a CPU; return for how long the GIL was kept from it.

        That is 0 when it was not kept in one go. Whoever keeps it may have got no CPU either.
        """
        lacked = 0.0 if self._own is None else self._own.waited(waited)
        if waited < self._long_turn:
            return 0.0
        times = self.pulse.thread.times()
        ready = 0.0 if times is None else max(0.0, times[1] - self._loop_ready)
        kept = waited - lacked - ready
        if kept < self._long_turn:
            return 0.0
        self._late += kept
        return kept

    def _note(
        self,
        beat: Beat,
        look: Look,
        same: bool,
        now: float,
        found: float,
        kept: float,
        cpu: float | None,
        call: str | None,
    ) -> None:
        """Keep a look at what may become a block."""
        held = self._held
        if beat is not self._beat or held is None:
            self._looks = self._steps = 0
            self._unclear = False
            held = Held(look, beat.began, beat.clocks.at, beat.clocks, self._lack_settled)
            first = max(beat.due, now - kept) if kept else found
        elif not same:
            self._step_over(held, beat, self.pulse.clocks(time.monotonic()), now)
            held = Held(look, held.last, held.last, held.at_last, held.lack_last)
            first = max(held.earliest, now - kept) if kept else found
            self._steps += 1
        else:
            first = held.first
        if held is not self._held:
            self._forget()
        self._beat, self._held = beat, held
        held.seen(look.sample, first, now, cpu)
        held.late += kept
        self._looks += 1
        self._mark()
        if call is not None and call != RUNNING and procfs.FUTEX is not None:
            held.waits_for_lock = bool(held.waits_for_lock) or call.partition(" ")[0] == procfs.FUTEX
        held.clocked(self.pulse.clocks(time.monotonic()), call == RUNNING, self._lack)
        self._loop_ready = held.at_last.ready

    # ------------------------------------------------------------------ judging
    def _is_block(self, held: Held, beat: Beat, clocks: Clocks, pending: float | None = None) -> bool:
        return held.is_block(beat, clocks, self._lack, self._threshold, pending)

    def _step_over(self, held: Held, beat: Beat, clocks: Clocks, now: float) -> None:
        """Report a step that was a block, when the loop was found in the next one."""
        pending = held.pending(clocks)
        if self._is_block(held, beat, clocks, pending=pending):
            self._report(held, clocks._replace(at=max(held.last, (held.last + now) / 2)))
            return
        robbed = now - held.earliest >= self._threshold and held.last - held.first >= self._threshold / 5
        if robbed or (not self._steps and held.own(clocks, self._lack, pending) >= self._threshold):
            self._unclear = True

    def _finish(self, ended: Ended) -> None:
        """Report a block that the beat ended, if it was one."""
        beat, clocks = ended
        held = self._held if beat is self._beat else None
        if held is not None and self._is_block(held, beat, clocks, pending=0.0):
            self._report(held, clocks)
        elif held is None or self._steps == 0:
            self._unseen(ended, held)
        elif self._unclear or clocks.ready - beat.clocks.ready >= self._threshold / 4:
            self._nobodys(ended)  # else many short steps, of which none is to blame
        self._settle()

    def _unseen(self, ended: Ended, held: Held | None) -> None:
        """Report a block that was over when this thread could look.

        Code is blamed when the GIL was kept for so long that it was one call; else it may have been many short steps.
        """
        beat, clocks = ended
        if held is None:
            held = Held(None, beat.began, beat.clocks.at, beat.clocks, self._lack_settled)
        held.late = max(held.late, self._late)
        if held.late >= self._threshold / 2 and held.own(clocks, self._lack) >= self._threshold:
            self._report(held, clocks)
        else:
            self._nobodys(ended)

    def _nobodys(self, ended: Ended) -> None:
        """Report a block for which nothing that was seen can be blamed: a step of a request, if that was so long."""
        lack, before = self._lack, self._lack_settled
        lacked = lack.waiting - before.waiting + lack.looking - before.looking
        self._over(self._judge.of_a_request(*ended, lacked) or starved_block(*ended))

    def _abandon(self) -> None:
        """Report a block after which the loop did not run again."""
        held, beat = self._held, self._beat
        if held is not None and beat is not None:
            end = held.at_last._replace(at=held.last)
            if self._is_block(held, beat, end):
                self._report(held, end)
        self._settle()

    def _report(self, held: Held, clocks: Clocks) -> None:
        self._over(self._judge.block(held, clocks, self._lack))

    def _over(self, block: Block) -> None:
        self.recent.append(block)
        self._reporter.over(block)

    def _forget(self) -> None:
        """Find the last step no more, and let the loop's thread let go of what its frame holds."""
        held = self._held
        if held is not None and held.look is not None:
            self.pulse.seen.append(held.look.base)
            held.look = None

    def _settle(self) -> None:
        """All is well: forget what belongs to no block, or to one that is over."""
        self._forget()
        self._late = 0.0
        self._looks = self._steps = 0
        self._unclear = False
        self._judge.elsewhere = {}
        self._beat = self._held = self._latest = None
        self._lack_settled = self._lack
