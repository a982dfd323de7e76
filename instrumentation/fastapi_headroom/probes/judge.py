"""Says what a block was: from a step that held the loop, and what is known of it, to site and cause."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Final

from fastapi_headroom.holds import steps_of
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes import procfs, routes
from fastapi_headroom.probes.blame import (
    UNKNOWN,
    Cause,
    Evidence,
    Sample,
    cause_of,
    most_common,
    site_of_endpoint,
)
from fastapi_headroom.probes.blocks import Block, in_flight
from fastapi_headroom.probes.held import Held
from fastapi_headroom.probes.lack import Lack
from fastapi_headroom.probes.pulse import Beat, Clocks, Pulse

MOST_THREADS: Final = 64
"""Threads whose CPU time is looked at."""


class Judge:
    """Makes blocks of steps. ``threshold`` is in seconds."""

    def __init__(self, threshold: float, pulse: Pulse) -> None:
        """``pulse`` is that of the loop, and knows for which code the garbage collector ran."""
        self._threshold, self._pulse = threshold, pulse
        self.elsewhere: dict[int, Sample] = {}
        """What the other threads did when the loop was found late: one of them may keep the GIL."""
        self._threads = self._threads_before = _cpu_of_threads()  # what they had before is nobody's fault
        self._looked = time.monotonic()

    def look_at_threads(self) -> None:
        """Remember how much CPU time each thread has had. Now and then, while all is well."""
        self._threads_before, self._looked = self._threads, time.monotonic()
        self._threads = _cpu_of_threads()

    def block(self, held: Held, after: Clocks, lack: Lack) -> Block:
        """Return the block that a step was, up to ``after``."""
        starved = held.starved(after, lack)
        evidence = _evidence(held, after, starved, held.lacked(lack))
        samples = tuple(held.samples)
        cause: Cause = cause_of(evidence, samples)
        starved = min(starved, evidence.wall)
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
        if cause == "gc" and (site == UNKNOWN or evidence.watchdog_late >= evidence.wall / 2):
            # The collector itself took the time, and no look came until a finalizer ran, or all was over.
            sample = self._collecting(held.earliest, after.at) or sample
            site = UNKNOWN if sample is None else sample.site
        block = Block(held.began, max(held.began, after.at), site, cause, sample, held.requests | in_flight(), starved)
        return self._named(block) if site == UNKNOWN and cause in ("python", "native", "io") else block

    def of_a_request(self, beat: Beat, after: Clocks, lacked: float) -> Block | None:
        """Return the block that a request's step was, between ``beat`` and ``after``, though nobody could look.

        It computed, and was long enough without the ``lacked`` seconds in which the watchdog got no CPU, as it may not
        have got one either.
        """
        step = self._longest_step(beat.clocks.at, after.at)
        if step is None:
            return None
        began, ended, request = step
        block = self.unseen(beat, after._replace(at=ended - lacked), (began, request), None, _site_for(request))
        if block is None or block.cause not in ("python", "native", "gc"):
            return None
        return replace(block, ended=ended, starved=block.starved + lacked, requests=block.requests | {request})

    def unseen(
        self,
        beat: Beat,
        after: Clocks,
        step: tuple[float, Ledger],
        sample: Sample | None,
        site: str | None = None,
    ) -> Block | None:
        """Return the block that a request's step was, up to ``after``, when nobody could look while it lasted.

        ``step`` is when it began and whose it is, ``sample`` what was found when it was possible to look again, and
        ``site`` what is known without. None when the step was shorter than a block, or long only for want of a CPU.
        """
        began, request = step
        before = beat.clocks
        # All that passed without a CPU since the beat, as if it had been in this step: never too much is blamed.
        starved = max(0.0, after.ready - before.ready)
        wall = after.at - began - starved
        if wall < self._threshold:
            return None
        cpu = after.cpu - before.cpu
        evidence = Evidence(
            wall=wall,
            cpu=cpu,
            ready=0.0,
            process_cpu=after.process - before.process,
            watchdog_late=wall if cpu >= wall / 2 else 0.0,
            collecting=after.collecting - before.collecting,
            waits_for_lock=None,
        )
        cause = cause_of(evidence, ())
        if cause == "gc":
            sample = self._collecting(began, after.at) or sample
        site = (site or UNKNOWN) if sample is None else sample.site
        return Block(began, after.at, site, cause, sample, in_flight(), starved, request)

    def _named(self, block: Block) -> Block:
        """Return a block that no look found at work, as the step of the request that took most of it, if one did."""
        step = self._longest_step(block.began, block.ended)
        if step is None or step[1] - step[0] < block.seconds / 2:
            return block
        request = step[2]
        return replace(
            block, site=_site_for(request), sample=None, request=request, requests=block.requests | {request}
        )

    def _longest_step(self, began: float, ended: float) -> tuple[float, float, Ledger] | None:
        """Return the longest step of a request between two moments: when it began and ended there, and whose it is."""
        ahead = time.perf_counter() - time.monotonic()  # steps are timed by the former
        steps = [
            (max(began, step.began - ahead), min(ended, step.ended - ahead), step.request)
            for step in steps_of(self._pulse.loop)
        ]
        longest = max(steps, key=lambda step: step[1] - step[0], default=None)
        return None if longest is None or longest[1] <= longest[0] else longest

    def _collecting(self, began: float, ended: float) -> Sample | None:
        """Return the code for which the garbage collector ran between two moments."""
        last = self._pulse.collection
        return last.sample if last is not None and began <= last.began <= ended else None

    def _find_culprit(self, held: Held, least: float) -> Sample | None:
        """Return what used most CPU since all were looked at, in one thread or several; at least ``least`` seconds."""
        now = _cpu_of_threads()
        # A watchdog that itself waits for the GIL may have found all well when this had begun already.
        before = self._threads if self._looked <= held.earliest else self._threads_before
        sites: dict[str, float] = {}
        for thread in threading.enumerate():
            sample = self.elsewhere.get(thread.ident or 0)
            if sample is None or thread.native_id is None:
                continue
            used = now.get(thread.native_id, 0.0) - before.get(thread.native_id, 0.0)
            used = sites[sample.site] = sites.get(sample.site, 0.0) + used
            if used > least:
                least, held.culprit = used, sample
        return held.culprit


def starved_block(beat: Beat, clocks: Clocks) -> Block:
    """Return the block after ``beat`` for which no code can be blamed."""
    return Block(beat.began, clocks.at, UNKNOWN, "starved", None, in_flight(), clocks.at - beat.began)


def _evidence(held: Held, after: Clocks, starved: float, lacked: float) -> Evidence:
    before = held.clocks
    wall = after.at - before.at
    could_look = max(held.late, wall - lacked - starved, 1e-6)
    return Evidence(
        wall=wall,
        cpu=after.cpu - before.cpu,
        ready=starved,
        process_cpu=after.process - before.process,
        watchdog_late=wall * held.late / could_look,
        collecting=after.collecting - before.collecting,
        waits_for_lock=held.waits_for_lock,
        wakes=held.wakes(after),
    )


def _site_for(request: Ledger) -> str:
    """Return the site of the endpoint that served a request, ``unknown`` for none of the user's."""
    return site_of_endpoint(routes.find_endpoint(request.app, request.route, request.method)) or UNKNOWN


def _cpu_of_threads() -> dict[int, float]:
    """Return the CPU seconds of the Python threads by native id; of none where the system does not tell."""
    found: dict[int, float] = {}
    for thread in threading.enumerate()[:MOST_THREADS]:
        if thread.native_id is not None and (seconds := procfs.thread_cpu(thread.native_id)) is not None:
            found[thread.native_id] = seconds
    return found
