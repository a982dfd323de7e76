"""A watchdog that looks when a test tells it to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blocks import Block
from fastapi_headroom.probes.pulse import Beat, Ended, Pulse
from fastapi_headroom.probes.vigil import _depth_below_task
from fastapi_headroom.probes.watchdog import Watchdog

THRESHOLD = 0.1


class Told:
    """Keeps the blocks that are over."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def lasts(self, block: Block) -> None:
        """Take no note."""

    def over(self, block: Block) -> None:
        self.blocks.append(block)


@contextmanager
def watchdog(told: Told) -> Iterator[Watchdog]:
    """One that looks when it is told to, at the loop of the caller, whose last beat was 106 ms ago."""
    pulse = Pulse(asyncio.get_running_loop())
    pulse.depth = _depth_below_task()
    now = time.monotonic()
    pulse.beat = Beat(pulse.clocks(now)._replace(at=now - 0.106), now - 0.062)
    watching = Watchdog(pulse, told, Guard("loop"), THRESHOLD)
    watching._loop_ready = pulse.beat.clocks.ready  # as one has it that looks all the time
    yield watching
    pulse.close()


def look(watchdog: Watchdog, waited: float = 0.0) -> None:
    """Have it look from another thread, while the step that calls this holds the loop."""
    looking = threading.Thread(target=lambda: watchdog._look(time.monotonic(), waited, suspect=True))
    looking.start()
    looking.join()


async def another_step() -> None:
    """Return in another step of the loop, after markers that lay there."""
    for _ in range(3):
        await asyncio.sleep(0)


def end(pulse: Pulse) -> None:
    """End the late beat, as the heartbeat does."""
    pulse.ended.append(Ended(pulse.beat, pulse.clocks(time.monotonic())))


def finish(watching: Watchdog) -> None:
    """End the late beat as the heartbeat does, which is at once on time again, and have the watchdog see to it."""
    pulse = watching.pulse
    end(pulse)
    now = time.monotonic()
    pulse.beat = Beat(pulse.clocks(now), now + 0.016)
    look(watching)
