"""Runs a fault on a real loop under the loop probe."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastapi_headroom.probes.loop import LoopProbe
from fastapi_headroom.probes.procfs import ThreadStat
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Labels = tuple[tuple[str, str], ...]
RUNS: dict[str, Run] = {"asyncio": asyncio.run, "uvloop": uvloop.run}
BLOCKED = "headroom_event_loop_blocked_seconds_total"
BLOCKS = "headroom_event_loop_blocks_total"
DELAY = "headroom_event_loop_delay_seconds"


@asynccontextmanager
async def measured(**settings: Any) -> AsyncIterator[tuple[Writer, LoopProbe]]:
    """Measure the running loop; ready once the heartbeat beats.

    Only collections that are asked for happen: one that falls due by itself falls where it likes, and is a cause.
    """
    gc.disable()
    writer, probe = Writer.in_memory(), LoopProbe(Settings(**settings))
    probe.guard.bind(writer)
    probe.bind(writer)
    try:
        await until(lambda: (f"{DELAY}_count", (("worker", "0"),)) in writer.samples())
        await until(lambda: writer.value(f"{DELAY}_count", worker="0") > 2)
        yield writer, probe
        assert writer.value("headroom_probe_errors_total", probe="loop") == 0, "a hook failed"
    finally:
        probe.close()
        gc.enable()


def burn(stopped: threading.Event) -> None:
    """Compute in Python, which gives way each 5 ms to one of those who wait for the GIL."""
    while not stopped.is_set():
        for _ in range(1000):
            pass


@contextmanager
def convoy(threads: int, work: Callable[[threading.Event], None] = burn) -> Iterator[None]:
    """Let threads of this process compute; ``work`` is told by the event when to stop."""
    stopped = threading.Event()
    started = [threading.Thread(target=work, args=(stopped,)) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in started:
            thread.join()


def objects_that_take(seconds: float) -> list[list[Any]]:
    """Return as many objects as make a collection of all take that long."""
    gc.disable()
    try:
        objects: list[list[Any]] = []
        while True:
            objects += [[] for _ in range(1_500_000)]
            began = time.monotonic()
            gc.collect()
            if time.monotonic() - began >= seconds:
                return objects
    finally:
        gc.enable()


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for a condition, without holding the loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def total(writer: Writer, name: str, **labels: str) -> float:
    """Return the sum over the series that have these labels."""
    wanted = set(labels.items())
    return sum(value for (sample, pairs), value in writer.samples().items() if sample == name and wanted <= set(pairs))


def verdicts(writer: Writer) -> dict[tuple[str, str], float]:
    """Return (site, cause) -> seconds blocked."""
    found: dict[tuple[str, str], float] = {}
    for (sample, pairs), value in writer.samples().items():
        if sample == BLOCKED:
            labels = dict(pairs)
            found[labels["site"], labels["cause"]] = value
    return found


def undisturbed(run: Run, fault: Callable[[], Awaitable[None]], attempts: int = 12) -> dict[tuple[str, str], float]:
    """Run a fault until it was not robbed of its CPU by other processes, and return the verdicts of that time.

    A block that got less than nine tenths of the CPU that it asked for may rightly be called starved, at least in part.
    """
    for _ in range(attempts):
        robbed, found = run(_once(fault))
        if robbed < 0.1:
            return found
    pytest.skip(f"other processes took the CPU in each of {attempts} attempts")


class Robbed:
    """Watches how long a thread was kept from a CPU since: by other processes, or with the whole machine."""

    def __init__(self, native_id: int | None = None) -> None:
        """Watch the caller's thread, unless another one is named."""
        self._stat = ThreadStat(native_id or threading.get_native_id())
        self._kept, self._began = self._seconds(), time.monotonic()

    def seconds(self) -> float:
        """Return the seconds."""
        return self._seconds() - self._kept

    def share(self) -> float:
        """Return the share of the time."""
        return self.seconds() / (time.monotonic() - self._began)

    def _seconds(self) -> float:
        """Return the seconds that the thread was ready, and those that other machines on the host took from this one.

        The kernel does not count the latter as a thread's; it tells them to a hundredth of a second, for all CPUs.
        """
        ready = (self._stat.times() or (0.0, 0.0))[1]
        return ready + int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let go of the descriptor."""
        self._stat.close()


def robbed_during(fault: Callable[[], object]) -> float:
    """Run a fault on this thread; return the share of its time in which the thread was kept from a CPU."""
    robbed = Robbed()
    fault()
    share = robbed.share()
    robbed.close()
    return share


async def _once(fault: Callable[[], Awaitable[None]]) -> tuple[float, dict[tuple[str, str], float]]:
    async with measured() as (writer, _):
        robbed = Robbed()
        await fault()
        share = robbed.share()
        robbed.close()
        await until(lambda: total(writer, BLOCKS) > 0)
        return share, verdicts(writer)
