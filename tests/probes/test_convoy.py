"""Threads that compute in Python make the loop queue for the GIL: the cause is gil, and they are to blame."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.probes.loops import RUNS, Run, convoy, measured, verdicts

pytestmark = pytest.mark.alone


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def blamed(run: Run, fault: Callable[[], Awaitable[None]]) -> tuple[str, str]:
    """Return function and cause of most of the time that was blamed on code; starved is not.

    Who keeps the GIL may be robbed of its CPU by other processes, and then nobody is to blame.
    """

    async def main() -> dict[tuple[str, str], float]:
        async with measured() as (writer, _):
            await fault()
            await asyncio.sleep(0.1)
            return {key: seconds for key, seconds in verdicts(writer).items() if key[1] != "starved"}

    for _ in range(5):
        found = run(main())
        if sum(found.values()) > 0.3:
            site, cause = max(found, key=found.__getitem__)
            return site.split(":")[1].rpartition(".")[2] if ":" in site else site, cause
    pytest.skip("other processes took the CPU from the threads that keep the GIL")


def talk(seconds: float) -> None:
    """Make short system calls, each of which gives the GIL away and has to wait for it again."""
    one, other = socket.socketpair()
    with one, other:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            one.send(b"x")
            other.recv(1)


def test_a_step_that_must_ask_for_the_gil_again_and_again(run: Run) -> None:
    """Many short calls within one step take long only because others have the GIL: that is no I/O of the step's."""

    async def fault() -> None:
        await asyncio.sleep(0.1)
        talk(0.8)

    with convoy(3):
        assert blamed(run, fault) == ("burn", "gil")


def test_a_loop_that_cannot_get_the_gil_for_its_next_step(run: Run) -> None:
    """Where no step runs, because the loop's thread stands in a queue of twenty for the GIL, it is gil as well."""

    async def fault() -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            await asyncio.sleep(0.005)

    with convoy(20):
        assert blamed(run, fault) == ("burn", "gil")
