"""Who held the loop: armed by what is long, for the iterations that it matters to, and free of cost otherwise."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from fastapi_headroom import holds
from fastapi_headroom.driver import Driven
from fastapi_headroom.holds import ITERATIONS, LINGER, LONG, SHORT, LoopHolds
from fastapi_headroom.ledger import DB, LOOP_BLOCKED, Ledger
from tests.support.virtual import Clock

MS = 1e-3


class Loop:
    """Keeps what it is asked to call in the next iteration."""

    def __init__(self) -> None:
        self.next: list[tuple[Any, tuple[Any, ...]]] = []

    def call_soon(self, callback: Any, *arguments: Any, context: Any = None) -> None:
        self.next.append((callback, arguments))

    def iterate(self) -> None:
        """Run one iteration."""
        due, self.next = self.next, []
        for callback, arguments in due:
            callback(*arguments)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(holds, "perf_counter", clock)
    return clock


@pytest.fixture
def loop() -> Iterator[Any]:
    yield Loop()


def step(account: LoopHolds, loop: Any, clock: Clock, seconds: float) -> None:
    """Hold the loop."""
    start = clock.now
    clock.take(seconds)
    account.step(loop, start, clock.now)


def test_a_long_step_counts_for_three_iterations(clock: Clock, loop: Any) -> None:
    """What runs within three iterations of a hold may have waited for it; what runs later has not."""
    account = LoopHolds()
    start = clock.now
    step(account, loop, clock, 0.5)
    for _ in range(ITERATIONS):
        assert account.held_since() == start
        loop.iterate()
    assert account.held_since() == start
    loop.iterate()
    assert account.held_since() is None
    assert loop.next == [], "the marker goes on although the loop is free"


def test_short_steps_without_a_pause_are_a_hold(clock: Clock, loop: Any) -> None:
    """Five steps of 2 ms in a row are one hold from the first one's start; with pauses between they are none."""
    account = LoopHolds()
    start = clock.now
    for _ in range(5):
        step(account, loop, clock, 2 * MS)
    assert account.held_since() == start
    account = LoopHolds()
    for _ in range(5):
        step(account, loop, clock, 2 * MS)
        clock.take(2 * MS)
    assert account.held_since() is None


def test_long_iterations_keep_the_account_going(clock: Clock, loop: Any) -> None:
    """On a loop that is never free, the last three iterations count, whoever fills them."""
    account = LoopHolds()
    step(account, loop, clock, 2 * LONG)
    for _ in range(20):
        loop.iterate()
        clock.take(0.1)
    held_since = account.held_since()
    assert held_since is not None
    assert clock.now - held_since == pytest.approx(0.1 * (ITERATIONS + 1))


def test_a_late_beat_is_a_hold_of_somebody_unknown(clock: Clock, loop: Any) -> None:
    """It began between the beat before and the one that was due; a step that was seen is known better."""
    account = LoopHolds()
    before, due = clock.now, clock.now + 0.016
    clock.take(0.5)
    account.late(loop, due, before, clock.now)
    assert account.held_since() == pytest.approx(before + 0.008)
    assert account.earliest == before
    account = LoopHolds()
    clock.take(1.0)
    before, due = clock.now, clock.now + 0.016
    clock.take(0.015)
    start = clock.now
    step(account, loop, clock, 0.5)
    account.late(loop, due, before, clock.now)
    assert account.held_since() == start


def test_arrivals_are_asked_for_only_after_a_hold(clock: Clock, loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step under 5 ms asks for nothing; a longer one for as long as new connections may be on their way."""
    monkeypatch.setattr(holds, "until", 0.0)
    account = LoopHolds()
    step(account, loop, clock, 0.9 * LONG)
    assert holds.until == 0.0
    clock.take(1.0)
    step(account, loop, clock, 2 * LONG)
    assert holds.until == pytest.approx(clock.now + LINGER)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_free_loop_sleeps_again(run: Any) -> None:
    """After a hold the loop goes round a few times and then waits for its next event, on both loops."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        while time.perf_counter() - began < 2 * LONG:
            pass
        holds.note_step(began, time.perf_counter())
        account = holds.of_running_loop()
        assert account is not None and account.armed
        for _ in range(ITERATIONS + 20):  # a disturbed machine makes one of them long
            await asyncio.sleep(0)
        assert not account.armed
        assert loop in holds._loops

    before = len(holds._loops)
    run(main())
    gc.collect()
    assert len(holds._loops) <= before, "a closed loop is kept"


def test_steps_outside_a_loop_are_left_alone() -> None:
    """A coroutine that something else than asyncio drives has no loop to hold."""
    holds.note_step(0.0, 1.0)
    assert holds.of_running_loop() is None


async def test_a_wait_without_a_socket_is_split_by_the_last_iterations() -> None:
    """A wait of 20 ms that ends within a hold of 100 ms: what was held is loop_blocked, as far as one can know."""
    ledger = Ledger()

    async def request() -> None:
        ledger.enter(DB)
        await asyncio.sleep(0.02)
        ledger.leave(DB)

    async def holder() -> None:
        await asyncio.sleep(0.01)
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass

    await asyncio.gather(Driven(request(), ledger), Driven(holder(), Ledger()))
    duration = ledger.finish(time.perf_counter())
    assert 0.095 <= ledger.seconds[LOOP_BLOCKED] <= duration - 0.009
    assert 0.009 <= ledger.seconds[DB] <= duration - 0.095
    assert sum(ledger.seconds) == pytest.approx(duration, abs=1e-9)


def test_a_step_is_looked_at_from_half_a_millisecond_on() -> None:
    """The limits fit: a hold of LONG is made of steps that are looked at."""
    assert SHORT < LONG < LINGER
