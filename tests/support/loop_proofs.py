"""Proofs of the loop probe that run for as long as they are given: briefly in the tests, at length in the soak."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from fastapi_headroom.probes import heartbeat as heartbeats
from fastapi_headroom.probes.loop import LoopProbe
from fastapi_headroom.store.writer import Writer
from tests.probes.loops import BLOCKS, Robbed, measured, total, until, verdicts

BLOCK = 0.1
LATE = 0.004
"""Seconds without a CPU after which the watchdog may miss a block of just the threshold."""


def sleep() -> None:
    """Hold the loop in a system call."""
    time.sleep(BLOCK)


def compute(seconds: float = BLOCK) -> None:
    """Hold the loop in Python code, by the clock."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def keep_the_gil(numbers: list[int] = []) -> None:  # noqa: B006 (remembered from call to call)
    """Hold the loop in one call in C that stops every other thread, for the block and up to twice as long."""
    if not numbers:  # the machine's speed changes by up to twofold
        began = time.thread_time()
        sum(range(300_000))
        numbers.append(int(300_000 * 2 * BLOCK / (time.thread_time() - began)))
    sum(range(numbers[0]))


async def notices_blocks(count: int, seed: int = 1) -> tuple[int, int]:
    """Block the loop that often for 100 ms, at random moments of the heartbeat.

    Return how many blocks were followed by one that was counted, and how many more were blamed on code.
    """
    moments = random.Random(seed)
    async with measured() as (writer, probe):

        async def wait(_: int) -> None:
            await asyncio.sleep(0.02 + moments.random() * 0.03)

        noticed = await _noticed(writer, probe, count, wait)
        return noticed, max(0, int(blamed(writer)) - count)


async def notices_blocks_at_rest(count: int, seed: int = 1) -> tuple[int, int]:
    """Block a loop whose heartbeat rests that often for 100 ms, at random moments between two looks.

    A timer, another thread and a socket set it off in turn.
    Return how many blocks were followed by one that was counted, and how often code was blamed when none held the loop.
    """
    moments = random.Random(seed)
    invented = 0
    async with measured() as (writer, probe):

        async def wait(number: int) -> None:
            nonlocal invented
            await rested(probe)
            before = blamed(writer)
            await (by_timer, by_thread, by_socket)[number // 3 % 3](moments.random() * 0.1)
            invented += blamed(writer) > before

        noticed = await _noticed(writer, probe, count, wait)
    return noticed, invented


async def _noticed(writer: Writer, probe: LoopProbe, count: int, wait: Callable[[int], Awaitable[None]]) -> int:
    """Block the loop that often, each time after ``wait``; return how many blocks were counted.

    One that is missed is done again if the watchdog was kept from a CPU meanwhile, up to a ninth of them.
    """
    noticed = repeated = number = 0
    while number < count:
        await wait(number)
        seen, robbed = await _is_noticed(writer, probe, (sleep, compute, keep_the_gil)[number % 3])
        if not seen and robbed and repeated < count / 9:
            repeated += 1
            continue
        noticed += seen
        number += 1
    print(f"{repeated} of {count} done again")
    return noticed


async def _is_noticed(writer: Writer, probe: LoopProbe, block: Callable[[], None]) -> tuple[bool, bool]:
    """Block the loop; return whether that was counted, and whether the watchdog was kept from a CPU meanwhile."""
    assert probe._watchdog is not None
    before, robbed = total(writer, BLOCKS), Robbed(probe._watchdog.native_id)
    block()
    late = robbed.seconds() > LATE
    robbed.close()
    deadline = time.monotonic() + 1
    while total(writer, BLOCKS) == before and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return total(writer, BLOCKS) > before, late


async def by_timer(seconds: float) -> None:
    """Go on after that time, as a timer of the loop."""
    await asyncio.sleep(seconds)


async def by_thread(seconds: float) -> None:
    """Go on after that time, when another thread says so."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    threading.Timer(seconds, loop.call_soon_threadsafe, [told.set]).start()
    await told.wait()


async def by_socket(seconds: float) -> None:
    """Go on after that time, when something has come over a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        threading.Timer(seconds, theirs.send, [b"x"]).start()
        assert await asyncio.get_running_loop().sock_recv(ours, 1) == b"x"


def blamed(writer: Writer) -> float:
    """Return how many blocks are some code's doing, and not the machine's."""
    return total(writer, BLOCKS) - total(writer, BLOCKS, cause="starved")


async def rested(probe: LoopProbe) -> None:
    """Wait until the heartbeat rests. It need not wait for its second: it considers that with the next beats.

    Timers that a busy machine runs late do not keep it from that.
    """
    heartbeat = probe._heartbeat
    assert heartbeat is not None

    def resting() -> bool:
        heartbeat._second_due = 0.0
        return heartbeat._pulse.resting

    with patch.object(heartbeats, "UNHELD", 2.0):
        await until(resting, seconds=30.0)


async def blamed_while_busy(seconds: float, tasks: int = 100, step: float = 0.002) -> dict[tuple[str, str], float]:
    """Run tasks whose short steps fill each turn of the loop; return what was blamed on code, starved left out.

    With these figures a turn takes 200 ms of CPU: every beat is late by that, and no step holds the loop for long.
    """
    end = time.monotonic() + seconds

    async def work() -> None:
        while time.monotonic() < end:
            until_then = time.thread_time() + step
            while time.thread_time() < until_then:
                pass
            await asyncio.sleep(0)

    async with measured() as (writer, _):
        await asyncio.gather(*(work() for _ in range(tasks)))
        return {key: value for key, value in verdicts(writer).items() if key[1] != "starved"}


@contextmanager
def contention(processes: int) -> Iterator[None]:
    """Let other processes take all the CPU that they can get."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
