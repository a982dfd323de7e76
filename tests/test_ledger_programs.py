"""Random programs of waits and steps of known length, on a virtual clock: the ledger tells what they did."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastapi_headroom.driver import Driven
from fastapi_headroom.holds import LONG
from fastapi_headroom.ledger import CACHE, DB, LOOP_BLOCKED, ON_LOOP, OTHER, Ledger, current
from fastapi_headroom.probes.request_tasks import TaskHook
from tests.support.virtual import Clock, Kernel, run

MS = 1e-3
EXACT = pytest.approx
Operation = tuple[str, int]
OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 60)),
    st.tuples(st.just("db"), st.integers(1, 200)),
    st.tuples(st.just("cache"), st.integers(1, 30)),
    st.tuples(st.just("sleep"), st.integers(1, 100)),
)
PROGRAM = st.lists(OPERATIONS, max_size=8)
PROGRAMS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@dataclass
class Request:
    """A program that starts after so many milliseconds; ``beside`` are its parts that run at the same time."""

    after: int
    program: list[Operation]
    beside: list[list[Operation]]

    def total(self, kind: str) -> float:
        """Return the seconds that the program says."""
        return MS * sum(n for part in (self.program, *self.beside) for name, n in part if name == kind)

    def count(self, kind: str) -> int:
        """Return how many operations of a kind there are."""
        return sum(name == kind for part in (self.program, *self.beside) for name, _ in part)


REQUEST = st.builds(Request, st.integers(0, 100), PROGRAM, st.just([]))
PARALLEL = st.builds(Request, st.integers(0, 100), PROGRAM, st.lists(PROGRAM, max_size=3))


def books_of(requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Ledger, float]]:
    """Run requests on one loop; return the ledger and the duration of each."""
    clock = Clock()
    kernel = Kernel(clock)
    stages = {"db": DB, "cache": CACHE}

    async def part(ledger: Ledger, program: list[Operation]) -> None:
        for kind, milliseconds in program:
            seconds = MS * milliseconds
            if kind == "step":
                clock.take(seconds)
            elif kind == "sleep":
                await asyncio.sleep(seconds)
            else:
                ledger.enter(stages[kind])
                try:
                    await kernel.answer(seconds)
                finally:
                    ledger.leave(stages[kind])

    async def whole(ledger: Ledger, request: Request) -> None:
        current.set(ledger)
        if request.beside:
            await asyncio.gather(*(part(ledger, each) for each in request.beside))
        await part(ledger, request.program)

    async def serve(request: Request) -> tuple[Ledger, float]:
        await asyncio.sleep(MS * request.after)
        ledger = Ledger(started=clock.now)
        await Driven(whole(ledger, request), ledger)
        return ledger, ledger.finish(clock.now)

    async def main() -> list[tuple[Ledger, float]]:
        hook = TaskHook()
        hook.attach(asyncio.get_running_loop())
        found = await asyncio.gather(*(serve(request) for request in requests))
        hook.detach()
        return list(found)

    found: list[tuple[Ledger, float]] = run(monkeypatch, clock, kernel, main())
    return found


@PROGRAMS
@given(requests=st.lists(PARALLEL, min_size=1, max_size=6))
def test_the_stages_sum_to_the_duration(requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever requests do, in one task or in several, their stages sum to their duration and their own steps are
    on_loop to the last millisecond."""
    for request, (ledger, duration) in zip(requests, books_of(requests, monkeypatch), strict=True):
        assert sum(ledger.seconds) == EXACT(duration, abs=1e-6)
        assert ledger.seconds[ON_LOOP] == EXACT(request.total("step"), abs=1e-6)
        assert min(ledger.seconds) >= 0.0


@PROGRAMS
@given(requests=st.lists(REQUEST, min_size=1, max_size=6))
def test_waits_are_as_long_as_the_answers_took(requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """However long others hold the loop, a wait for a socket is charged with the time until its answer came, within
    what is not looked at, and the rest is loop_blocked."""
    for request, (ledger, _) in zip(requests, books_of(requests, monkeypatch), strict=True):
        for stage, kind in ((DB, "db"), (CACHE, "cache")):
            tolerance = request.count(kind) * LONG + 1e-6
            assert request.total(kind) - 1e-6 <= ledger.seconds[stage] <= request.total(kind) + tolerance
        assert ledger.seconds[OTHER] <= request.total("sleep") + request.count("sleep") * LONG + 1e-6


@PROGRAMS
@given(request=REQUEST)
def test_a_request_that_is_alone_is_never_blocked(request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own steps hold the loop, and that is on_loop and nothing else."""
    ((ledger, duration),) = books_of([request], monkeypatch)
    assert ledger.seconds[LOOP_BLOCKED] == EXACT(0.0, abs=1e-6)
    assert ledger.seconds[DB] == EXACT(request.total("db"), abs=1e-6)
    assert ledger.seconds[OTHER] == EXACT(request.total("sleep"), abs=1e-6)
    assert duration == EXACT(sum(request.total(kind) for kind in ("step", "db", "cache", "sleep")), abs=1e-6)
