"""The ledger sums to the wall time, and the driver is invisible to the coroutine that it drives."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Coroutine
from typing import Any

import anyio
import pytest

from fastapi_headroom.driver import Driven
from fastapi_headroom.ledger import CACHE, DB, ON_LOOP, OTHER, POOL_WAIT, STAGES, THREADPOOL, Ledger


def busy(seconds: float) -> None:
    """Hold the thread."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


async def drive(coroutine: Coroutine[Any, Any, Any], ledger: Ledger | None = None) -> Any:
    """Await a coroutine under the driver."""
    return await Driven(coroutine, ledger or Ledger())


async def run(coroutine: Coroutine[Any, Any, Any], ledger: Ledger) -> float:
    """Drive a coroutine as a request and return its duration."""
    await drive(coroutine, ledger)
    return ledger.finish(time.perf_counter())


async def waiting(ledger: Ledger, stage: int, wait: Awaitable[Any]) -> None:
    """Await something as a wait of a stage."""
    ledger.enter(stage)
    try:
        await wait
    finally:
        ledger.leave(stage)


async def test_code_that_holds_the_loop_is_on_loop_and_sleep_is_other() -> None:
    """100 ms of computing are charged to on_loop and 50 ms of sleep to other."""

    held, slept = 0.0, 0.0  # by the request's own clock: a busy machine stretches both

    async def request() -> None:
        nonlocal held, slept
        began = time.perf_counter()
        busy(0.1)
        computed = time.perf_counter()
        await asyncio.sleep(0.05)
        held, slept = computed - began, time.perf_counter() - computed

    ledger = Ledger()
    duration = await run(request(), ledger)
    assert held == pytest.approx(ledger.seconds[ON_LOOP], abs=0.05) and held >= 0.1
    assert slept == pytest.approx(ledger.seconds[OTHER], abs=0.05) and slept >= 0.048
    assert held == pytest.approx(ledger.longest_step, abs=0.05)
    assert sum(ledger.seconds) == pytest.approx(duration, abs=1e-9)


async def test_the_longest_step_is_one_step_and_not_the_sum() -> None:
    """Five steps of 10 ms hold the loop for 10 ms in one go."""

    steps: list[float] = []

    async def request() -> None:
        for _ in range(5):
            began = time.perf_counter()
            busy(0.01)
            steps.append(time.perf_counter() - began)
            await asyncio.sleep(0)

    ledger = Ledger()
    await run(request(), ledger)
    assert ledger.seconds[ON_LOOP] >= sum(steps) >= 0.05
    assert max(steps) <= ledger.longest_step < max(steps) + 0.035, "less than the four other steps take"


async def test_waits_are_charged_to_their_stages() -> None:
    """Waits one after another go each to its own stage."""
    ledger = Ledger()

    times: list[float] = []

    async def request() -> None:
        times.append(time.perf_counter())
        await waiting(ledger, POOL_WAIT, asyncio.sleep(0.03))
        times.append(time.perf_counter())
        await waiting(ledger, DB, asyncio.sleep(0.06))
        times.append(time.perf_counter())

    duration = await run(request(), ledger)
    assert 0.029 <= ledger.seconds[POOL_WAIT] <= times[1] - times[0]
    assert 0.059 <= ledger.seconds[DB] <= times[2] - times[1]
    assert sum(ledger.seconds) == pytest.approx(duration, abs=1e-9)


async def test_overlapping_waits_sum_to_the_wall_time() -> None:
    """Ten queries and a cache read of 50 ms at once are 50 ms, not 550."""
    ledger = Ledger()

    async def request() -> None:
        waits = [waiting(ledger, DB, asyncio.sleep(0.05)) for _ in range(10)]
        await asyncio.gather(*waits, waiting(ledger, CACHE, asyncio.sleep(0.05)))

    duration = await run(request(), ledger)
    assert sum(ledger.seconds) == pytest.approx(duration, abs=1e-9)
    assert duration < 0.25
    assert 0.03 <= ledger.seconds[DB] + ledger.seconds[CACHE] <= duration
    assert ledger.seconds[DB] > 5 * ledger.seconds[CACHE] > 0


async def test_a_wait_of_another_thread_counts() -> None:
    """A query made in the thread of a sync endpoint is charged to db while the loop is free."""
    ledger = Ledger()

    took, free = 0.0, threading.Event()

    def endpoint() -> None:
        nonlocal took
        assert free.wait(30)
        began = time.perf_counter()
        ledger.enter(DB)
        time.sleep(0.05)
        ledger.leave(DB)
        took = time.perf_counter() - began

    async def request() -> None:
        asyncio.get_running_loop().call_soon(free.set)  # when the step that starts the thread is over
        await asyncio.to_thread(endpoint)

    duration = await run(request(), ledger)
    assert 0.05 <= ledger.seconds[DB] <= took
    assert sum(ledger.seconds) == pytest.approx(duration, abs=1e-9)


def test_what_a_thread_waits_for_is_not_time_of_the_thread() -> None:
    """A wait that is opened in a thread takes the time while it is open; the thread has the time before and after."""
    ledger = Ledger(started=0.0)
    ledger.waits += [THREADPOOL]
    ledger.charge(1.0)
    ledger.waits += [DB]
    ledger.charge(3.0)
    ledger.waits += [CACHE, THREADPOOL]
    ledger.charge(7.0)
    ledger.waits[:] = [THREADPOOL, THREADPOOL]
    ledger.charge(8.0)
    assert ledger.seconds[THREADPOOL] == 2.0
    assert (ledger.seconds[DB], ledger.seconds[CACHE]) == (4.0, 2.0)


async def test_many_threads_cannot_break_the_ledger() -> None:
    """Waits opened and closed by eight threads at once raise nothing and leave nothing open."""
    ledger = Ledger()

    def hammer() -> None:
        for _ in range(2000):
            ledger.enter(DB)
            ledger.enter(CACHE)
            ledger.leave(DB)
            ledger.leave(CACHE)

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert ledger.waits == []
    ledger.finish(time.perf_counter())
    assert min(ledger.seconds) >= 0.0


async def test_steps_after_the_end_do_not_count() -> None:
    """What runs after the last byte, such as a background task, is not the request's time."""
    ledger = Ledger()

    async def request() -> None:
        ledger.finish(time.perf_counter())
        busy(0.02)
        await asyncio.sleep(0)
        busy(0.02)
        await waiting(ledger, DB, asyncio.sleep(0.01))

    await drive(request(), ledger)
    assert sum(ledger.seconds) < 0.01
    assert ledger.longest_step < 0.01


def test_leaving_what_was_not_entered_is_harmless() -> None:
    """A stray leave changes nothing."""
    ledger = Ledger()
    ledger.leave(DB)
    ledger.finish(ledger.started + 1.0)
    assert ledger.seconds[OTHER] == pytest.approx(1.0)
    assert sum(ledger.seconds) == pytest.approx(1.0)


def test_the_stages_are_those_of_the_contract() -> None:
    """The constants index the names."""
    assert STAGES[ON_LOOP] == "on_loop"
    assert STAGES[POOL_WAIT] == "pool_wait"
    assert STAGES[DB] == "db"
    assert STAGES[CACHE] == "cache"
    assert STAGES[OTHER] == "other" == STAGES[-1]


# ------------------------------------------------------------------ the driver
async def test_driver_second_cancellation_reaches_the_coroutine() -> None:
    """A second cancellation while the first is handled is delivered, and the clean-up of both runs."""
    log: list[str] = []

    async def request() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            log.append("first")
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                log.append("second")
                raise
            finally:
                log.append("cleanup")

    task = asyncio.create_task(drive(request()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["first", "second", "cleanup"]


async def test_driver_move_on_after_swallows_its_own_cancellation() -> None:
    """anyio.move_on_after ends the block it guards and leaks nothing, one within the other too."""

    async def request() -> str:
        with anyio.move_on_after(0.5), anyio.move_on_after(0.01) as inner:
            await anyio.sleep(10)
        assert inner.cancelled_caught
        with anyio.move_on_after(0.01):
            try:
                await anyio.sleep(10)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
        await asyncio.sleep(0)
        return "went on"

    assert await drive(request()) == "went on"
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0


async def test_driver_leaves_exc_info_clean() -> None:
    """No exception is current after one that was thrown in has been handled."""
    seen: list[Any] = []

    async def request() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            pass
        seen.append(sys.exc_info()[0])
        await asyncio.sleep(0)
        seen.append(sys.exc_info()[0])
        try:
            raise ValueError("own")
        except ValueError as error:
            seen.append(error.__context__)

    task = asyncio.create_task(drive(request()))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert seen == [None, None, None]


async def test_driver_keeps_the_traceback_of_the_user() -> None:
    """The innermost frame of an exception is the user's, and nothing is chained to it."""

    async def broken() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    with pytest.raises(LookupError) as caught:
        await drive(broken())
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "broken"
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


async def test_driver_shares_context_variables() -> None:
    """A context variable set inside is seen outside, as with a plain await."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    async def request() -> None:
        variable.set(1)
        await asyncio.sleep(0)
        variable.set(variable.get() + 1)

    await drive(request())
    assert variable.get() == 2


async def test_driver_closes_the_coroutine() -> None:
    """Closing runs the clean-up of the coroutine."""
    log: list[str] = []

    async def request() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            log.append("closed")

    driven = drive(request())
    driven.send(None)
    driven.close()
    assert log == ["closed"]


async def test_a_driven_task_cancelled_before_it_starts_warns_nothing() -> None:
    """Its coroutine counts as started and ended, as it would without the driver."""

    async def never() -> None:
        raise AssertionError("must not run")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = asyncio.create_task(Driven(never(), Ledger()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()


async def test_a_driven_task_can_be_looked_into() -> None:
    """Task.get_stack and the name of the coroutine are those of the bare coroutine."""
    started = asyncio.Event()

    async def inspected() -> None:
        started.set()
        await asyncio.sleep(10)

    task = asyncio.create_task(Driven(inspected(), Ledger()))
    await started.wait()
    assert [frame.f_code.co_name for frame in task.get_stack()] == ["inspected"]
    assert "inspected" in repr(task)
    task.cancel()
