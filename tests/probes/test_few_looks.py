"""Blocks that the watchdog could look at once only, as beside Python code that gives it the GIL every 5 ms."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

from fastapi_headroom.probes.procfs import ThreadStat
from fastapi_headroom.probes.pulse import Beat
from fastapi_headroom.probes.watchdog import Watchdog
from tests.probes.looks import THRESHOLD, Told, another_step, end, look, watchdog
from tests.probes.loops import objects_that_take

pytestmark = pytest.mark.alone


async def test_look_that_comes_after_the_end_belongs_to_no_step_of_the_block() -> None:
    """The beat came while the second look was on its way: what that found is no second short step."""
    told = Told()
    with watchdog(told) as watching:
        look(watching)
        await another_step()
        end(watching.pulse)
        look(watching)
    assert [block.cause for block in told.blocks] == ["starved"]


async def test_step_that_may_have_been_a_block_is_counted_though_another_followed() -> None:
    """Found once, it may have held the loop since the last beat: that is said, and nobody is blamed for it."""
    told = Told()
    with watchdog(told) as watching:
        look(watching)
        await another_step()
        look(watching)
        end(watching.pulse)
        look(watching)
    assert [block.cause for block in told.blocks] == ["starved"]


async def test_gil_that_is_kept_in_the_middle_of_a_look_is_the_blocks_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look gives the GIL away when it asks the kernel; what keeps it until the block is over is not starved."""
    told = Told()
    with watchdog(told) as watching:

        def system_call(_: ThreadStat) -> str:
            time.sleep(0.1)  # as a call in C has it, that keeps the GIL
            end(watching.pulse)
            return "running"

        monkeypatch.setattr(ThreadStat, "system_call", system_call)
        look(watching)
    assert len(told.blocks) == 1
    assert told.blocks[0].cause != "starved"


@pytest.mark.parametrize("first", ["after it", "in the next step"])
async def test_collection_is_blamed_on_the_code_that_it_ran_in(first: str) -> None:
    """The collector keeps the GIL, and whoever gets it next may not be the watchdog: its code is known all the same."""
    told = Told()
    knots = objects_that_take(2 * THRESHOLD)
    with watchdog(told) as watching:
        began = time.monotonic()
        collect_all()
        took = time.monotonic() - began
        await another_step()
        if first == "in the next step":
            look(watching, waited=took)
            await another_step()
        else:
            watching._late = took
        end(watching.pulse)
        look(watching)
    del knots
    assert [(block.site.split(":")[-2], block.cause) for block in told.blocks] == [("collect_all", "gc")]


async def test_finalizer_that_takes_the_collections_time_is_blamed() -> None:
    """The collector let go of the GIL for it, so looks found what it called, one after the other."""
    told = Told()
    with watchdog(told) as watching:
        Slow(watching)
        gc.collect()
        await another_step()
        end(watching.pulse)
        look(watching)
    assert [(block.site.split(":")[-2], block.cause) for block in told.blocks] == [("look", "gc")]


class Slow:
    """Garbage that only the collector finds."""

    def __init__(self, watching: Watchdog) -> None:
        self.itself, self.watching = self, watching

    def __del__(self) -> None:
        for _ in range(5):
            look(self.watching)
            time.sleep(0.05)


def collect_all() -> None:
    gc.collect()


async def test_short_steps_are_no_block() -> None:
    """Steps that were found one after the other, none of them for long, are none, however late they made the beat."""
    for _ in range(12):
        told = Told()
        with watchdog(told) as watching:
            pulse, now = watching.pulse, time.monotonic()
            beat = pulse.beat = Beat(pulse.clocks(now)._replace(at=now - 0.05), now - 0.03)
            longest = 0.0
            for _ in range(4):
                look(watching)
                await asyncio.sleep(0.02)
                longest, now = max(longest, time.monotonic() - now), time.monotonic()
            end(pulse)
            look(watching)
            robbed = pulse.clocks(now).ready - beat.clocks.ready
        if longest < 0.04 and robbed < THRESHOLD / 8:  # else the machine made them long
            assert told.blocks == []
            return
    pytest.skip("other processes took the CPU in each of 12 attempts")
