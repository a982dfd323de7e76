"""A step is a block by its own time, and two looks found one and the same step only when that is certain."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from fastapi_headroom.probes.blame import Look, Sample
from fastapi_headroom.probes.held import SLACK, Held, Marker
from fastapi_headroom.probes.lack import Lack
from fastapi_headroom.probes.pulse import Beat, Clocks

pytestmark = pytest.mark.alone

SAMPLE = Sample("app:view:1", (1, 5, 40), in_call=True, waited=0.0, stack=())
START = Clocks(at=10.0, cpu=0.0, ready=0.0, process=0.0, collecting=0.0)
BEAT = Beat(START, due=10.016)
THRESHOLD = 0.1


def held(**last: Any) -> Held:
    """Return a step that was found 40 and 90 ms after the beat, with the clocks of the second look."""
    step = Held(Look(SAMPLE, None, None), BEAT.began, START.at, START, Lack())
    step.seen(SAMPLE, 10.04, 10.04)
    step.clocked(START._replace(at=10.04, cpu=0.04), running=True, lack=Lack())
    step.seen(SAMPLE, 10.04, 10.09)
    step.clocked(START._replace(**{"at": 10.09, "cpu": 0.09, **last}), running=True, lack=Lack())
    return step


def is_block(step: Held, lack: Lack = Lack(), **end: Any) -> bool:  # noqa: B008 (it is frozen)
    return step.is_block(BEAT, START._replace(**{"at": 10.11, "cpu": 0.11, **end}), lack, THRESHOLD, pending=0.0)


def test_long_step_is_a_block() -> None:
    """A step that was there at two looks and may have lasted for the threshold is one."""
    assert is_block(held())


def test_short_step_is_none() -> None:
    """One that cannot have lasted for the threshold is none, nor one that was found but once."""
    assert not is_block(held(), at=10.095)
    once = Held(Look(SAMPLE, None, None), BEAT.began, START.at, START, Lack())
    once.seen(SAMPLE, 10.04, 10.04)
    once.clocked(START._replace(at=10.04, cpu=0.04), running=True, lack=Lack())
    assert not is_block(once)


def test_time_without_a_cpu_is_not_its_own() -> None:
    """A step that was ready without a CPU for most of the time is none, however long it took."""
    assert not is_block(held(cpu=0.045, ready=0.045), cpu=0.065, ready=0.045)


def test_cpu_time_is_its_own() -> None:
    """A step that computed for the threshold is a block, also when it had to wait for its CPU."""
    step = held(at=10.25, cpu=0.09, ready=0.15)
    step.last = 10.25
    assert is_block(step, at=10.27, cpu=0.11, ready=0.15)


def test_wait_that_the_kernel_has_not_counted() -> None:
    """A thread that neither ran nor slept since the last look waits for a CPU, which is counted when that is over."""
    step = held(cpu=0.045)
    assert step.pending(START._replace(at=10.11, cpu=0.045)) == pytest.approx(0.065)
    assert not step.is_block(BEAT, START._replace(at=10.11, cpu=0.045), Lack(), THRESHOLD)


def test_sleep_is_its_own() -> None:
    """A thread that was found in a system call slept in it."""
    step = held(cpu=0.045)
    step.clocked(START._replace(at=10.1, cpu=0.045), running=False, lack=Lack())
    assert step.pending(START._replace(at=10.11, cpu=0.045)) == 0.0
    assert is_block(step, cpu=0.045)


@pytest.mark.parametrize("lack", [Lack(waiting=0.06), Lack(looking=0.06)])
def test_nobody_is_blamed_for_what_nobody_saw(lack: Lack) -> None:
    """When the watchdog itself got no CPU, what ran meanwhile is not known, and it may have kept the GIL."""
    assert not is_block(held(), lack, cpu=0.05)


def test_little_time_without_a_cpu_before_it_was_seen() -> None:
    """Some milliseconds without a CPU that may be older than the step do not make it shorter."""
    assert is_block(held(ready=SLACK), at=10.1005, cpu=0.05, ready=SLACK)


def function() -> FrameType:
    return sys._getframe()


def test_functions_are_told_apart_by_their_frames() -> None:
    """Each call has a frame of its own as long as the one before is kept, so a later one is another step."""
    first = function()
    step = Held(Look(SAMPLE, first, None), BEAT.began, START.at, START, Lack())
    marker = Marker()
    marker()
    assert step.is_found_by(Look(SAMPLE, first, None), marker)
    assert not step.is_found_by(Look(SAMPLE, function(), None), marker)


def test_steps_of_a_coroutine_are_told_apart_by_the_marker() -> None:
    """A coroutine keeps its frame: it is in the same step only as long as the loop has not gone on to the marker."""

    async def coroutine() -> None:
        pass

    made = coroutine()
    look = Look(SAMPLE, made.cr_frame, None)
    step = Held(look, BEAT.began, START.at, START, Lack())
    marker = Marker()
    assert step.is_found_by(look, marker)
    marker()
    assert not step.is_found_by(look, marker)
    made.close()


def test_start_that_the_step_driver_knows() -> None:
    """A step of a request began when the driver says, not half way to the beat before."""
    import time

    now = time.monotonic()
    look = Look(SAMPLE, function(), time.perf_counter() - 0.03)
    step = Held(look, now - 0.08, now - 0.1, START, Lack())
    assert step.began == step.earliest == step.first == pytest.approx(now - 0.03, abs=0.005)
