"""The loop's delay, utilization, CPU and tasks are what really happened, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from fastapi_headroom import catalog, ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.heartbeat import _milliseconds
from fastapi_headroom.probes.loop import SETTLED, LoopProbe
from fastapi_headroom.probes.procfs import ThreadStat
from fastapi_headroom.probes.pulse import Pulse
from fastapi_headroom.probes.rest import Rest, selector_of
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer
from tests.probes.loops import DELAY, RUNS, Run, measured, total, until
from tests.support.loop_proofs import rested
from tests.support.measured import best_of

pytestmark = pytest.mark.alone

UTILIZATION = "headroom_event_loop_utilization_ratio"


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def share_above(writer: Writer, bound: str) -> float:
    """Return the share of beats that were later than a bound."""
    count = writer.value(f"{DELAY}_count", worker="0")
    return 1 - writer.value(f"{DELAY}_bucket", worker="0", le=bound) / count


def test_missed_beats_are_filled_in(run: Run) -> None:
    """A loop stuck a quarter of the time in 200 ms spells is over 100 ms late an eighth of it: missed beats count."""

    async def main() -> tuple[float, float]:
        async with measured() as (writer, _):
            before = writer.value(f"{DELAY}_count", worker="0")
            began = time.monotonic()
            for _ in range(2):
                await asyncio.sleep(0.6)
                time.sleep(0.2)  # noqa: ASYNC251
            await asyncio.sleep(0.1)
            beats = writer.value(f"{DELAY}_count", worker="0") - before
            return beats * 0.0165 / (time.monotonic() - began), share_above(writer, "0.1")

    def right(found: tuple[float, float]) -> bool:
        return found == (pytest.approx(1.0, rel=0.15), pytest.approx(0.125, abs=0.04))

    found = best_of(lambda: run(main()), right)
    assert right(found), found


def test_tenth_of_the_time_in_long_spells_shows_in_the_p99(run: Run) -> None:
    """A loop stuck a tenth of the time in 500 ms spells has its p99 above 250 ms: 5 % of its delays are."""

    async def main() -> float:
        async with measured() as (writer, _):
            for _ in range(2):
                await asyncio.sleep(2.25)
                time.sleep(0.5)  # noqa: ASYNC251
                await asyncio.sleep(2.25)
            return share_above(writer, "0.25")

    assert best_of(lambda: run(main()), lambda share: abs(share - 0.05) <= 0.015) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("hold", [spin, time.sleep], ids=["computing", "sleeping"])
def test_delay_is_right(run: Run, hold: Callable[[float], None]) -> None:
    """What is recorded is how late the loop was to within 5 ms, for holds of 20 to 300 ms that begin at any moment."""

    async def error(probe: LoopProbe, seconds: float) -> float:
        heartbeat = probe._heartbeat
        assert heartbeat is not None
        heartbeat.worst = 0.0
        due = heartbeat._pulse.beat.due
        hold(seconds)
        late = time.monotonic() - due
        await until(lambda: heartbeat._pulse.beat.due != due)
        return heartbeat.worst - max(0.0, late)

    async def main() -> None:
        async with measured() as (_, probe):
            for number in range(20):
                for _ in range(10):  # again when another process had the CPU between the hold and the beat
                    await asyncio.sleep(0.03 + number % 5 * 0.003)
                    off = await error(probe, 0.02 + number * 0.015)
                    if abs(off) < 0.005:
                        break
                assert abs(off) < 0.005

    run(main())


def test_failure_of_the_rest_is_not_tried_on_each_beat(run: Run) -> None:
    """What is done once a second is not done again with each beat when it fails."""

    async def main() -> None:
        writer, probe = Writer.in_memory(), LoopProbe(Settings())
        probe.guard.bind(writer)
        calls: list[float] = []

        def fail() -> float:
            calls.append(time.monotonic())
            raise RuntimeError("on purpose")

        probe._each_second = fail  # type: ignore[method-assign]
        probe.bind(writer)
        began = time.monotonic()
        await asyncio.sleep(0.5)
        probe.close()
        assert 1 <= len(calls) <= 1 + int(time.monotonic() - began)
        assert writer.value("headroom_probe_errors_total", probe="loop") == len(calls)

    run(main())


def test_long_block_is_filled_in_cheaply(run: Run) -> None:
    """A block of many beats is recorded in full, with at most about a thousand observations."""

    async def main() -> None:
        async with measured() as (writer, probe):
            heartbeat = probe._heartbeat
            assert heartbeat is not None
            before = writer.value(f"{DELAY}_count", worker="0")
            clocks = heartbeat._pulse.clocks(time.monotonic())
            began = time.thread_time()
            missed = heartbeat._record(heartbeat._pulse.beat, clocks, late=3600.0)
            assert time.thread_time() - began < 0.05
            assert missed == pytest.approx(3600 / 0.016, abs=1)
            assert writer.value(f"{DELAY}_count", worker="0") - before == missed + 1
            assert share_above(writer, "10.0") > 0.99

    run(main())


def test_quiet_loop_is_left_asleep(run: Run) -> None:
    """A loop that does nothing is woken once a second, and its delay is recorded as densely as ever."""

    async def main() -> None:
        async with measured() as (writer, probe):
            heartbeat = probe._heartbeat
            assert heartbeat is not None
            rested, disturbed = 0, 0.0
            for _ in range(10):  # whatever takes 100 ms of a machine ends a rest
                beats = heartbeat.beats
                before, began = writer.value(f"{DELAY}_count", worker="0"), time.monotonic()
                await asyncio.sleep(2.5)
                counted = writer.value(f"{DELAY}_count", worker="0") - before
                assert counted == pytest.approx((time.monotonic() - began) / 0.0165, abs=75)
                rested += heartbeat.beats - beats <= 4
                if rested == 2:
                    break
                disturbed = max(disturbed, await late_timers())
            if rested < 2 and disturbed > 0.05:
                pytest.skip(f"{disturbed:.0%} of this machine's timers fire late while nothing runs")
            assert rested == 2

    run(main())


@pytest.mark.parametrize("disturbance", ["request", "work", "hold", "failure"])
def test_what_happens_ends_the_rest(run: Run, disturbance: str) -> None:
    """A request in flight, work, a call that holds the loop and a probe that fails: beats come as often as ever."""

    async def main() -> None:
        async with measured() as (writer, probe):
            heartbeat, watchdog = probe._heartbeat, probe._watchdog
            assert heartbeat is not None and watchdog is not None
            await rested(probe)
            request, goes_on = Ledger("/"), watchdog._rest.goes_on
            if disturbance == "request":
                ledger.in_flight.add(request)
            elif disturbance == "work":
                spin(0.01)
            elif disturbance == "hold":
                time.sleep(0.06)  # noqa: ASYNC251
            else:
                watchdog._rest.goes_on = lambda now: 1 / 0  # type: ignore[method-assign, assignment]
            try:
                await until(lambda: not heartbeat._long, seconds=0.9)
                beats = heartbeat.beats
                await until(lambda: heartbeat.beats - beats > 10, seconds=0.9)
            finally:
                ledger.in_flight.discard(request)
                watchdog._rest.goes_on = goes_on  # type: ignore[method-assign]
                failures = writer.value("headroom_probe_errors_total", probe="loop")
                writer.counter(catalog.PROBE_ERRORS, "loop").inc(-failures)
                assert failures == (disturbance == "failure")

    run(main())


def test_where_nobody_tells_what_a_thread_waits_for_the_heartbeat_does_not_rest(run: Run) -> None:
    """Without the kernel's word, and on a loop without a descriptor, beats come as often as ever."""

    async def main() -> None:
        pulse = Pulse(asyncio.get_running_loop())
        rest = Rest(pulse, 0.1)
        assert rest.possible
        pulse.thread.close()
        pulse.resting = True
        assert not rest.goes_on(time.monotonic())
        assert not pulse.resting and not rest.possible
        pulse.close()

    run(main())
    assert selector_of(object()) is None  # type: ignore[arg-type]
    closed = asyncio.new_event_loop()
    closed.close()
    assert selector_of(closed) is None


def test_no_beat_asks_for_a_time_that_the_selector_rounds_up() -> None:
    """``epoll_wait`` is asked for the whole milliseconds that were meant: else a free loop looks late."""
    for milliseconds in range(1, 41):
        asked = _milliseconds(milliseconds * 1e-3)
        assert asked - milliseconds in (0, 1)
        assert asked * 1e-3 * 1e9 <= asked * 10**6


@pytest.mark.parametrize("hold", [spin, time.sleep], ids=["computing", "sleeping"])
def test_half_busy_loop(run: Run, hold: Callable[[float], None]) -> None:
    """A loop that is held half of the time reads 0.4 to 0.6, whether it computes or sleeps in a blocking call."""

    async def measure(probe: LoopProbe) -> tuple[float, float]:
        """Return the share of time that the loop was held, and that in which its thread waited for a CPU."""
        stat = ThreadStat(threading.get_native_id())
        probe._history.clear()
        probe.sample()
        ready = (stat.times() or (0.0, 0.0))[1]
        began, held = time.monotonic(), 0.0
        while time.monotonic() - began < 2.5:
            start = time.monotonic()
            hold(0.02)
            held += time.monotonic() - start
            await asyncio.sleep(max(0.001, held * 2 - (time.monotonic() - began)))
        probe.sample()
        took = time.monotonic() - began
        robbed = ((stat.times() or (0.0, 0.0))[1] - ready) / took
        stat.close()
        return held / took, robbed

    async def main() -> None:
        async with measured() as (writer, probe):
            for _ in range(4):  # a wait for a CPU between two holds rightly counts as well
                held, robbed = await measure(probe)
                if robbed < 0.05:
                    break
            assert writer.value(UTILIZATION, worker="0") == pytest.approx(held, abs=0.1 + robbed)
            cpu = writer.value("headroom_event_loop_cpu_ratio", worker="0")
            assert cpu > held - robbed - 0.2 if hold is spin else cpu < 0.2

    run(main())


def test_idle_loop(run: Run) -> None:
    """An idle loop reads nearly 0, and the probe takes next to no CPU for it."""

    async def main() -> None:
        async with measured() as (writer, probe):
            for _ in range(12):  # a wait for a CPU that others have, or a timer that fires late, is no idle time
                disturbed = await late_timers()
                probe._history.clear()
                probe.sample()
                used = time.process_time()
                await asyncio.sleep(1)
                used = time.process_time() - used
                probe.sample()
                utilization = writer.value(UTILIZATION, worker="0")
                if utilization < 0.1 and used < 0.02:
                    break
                disturbed = max(disturbed, await late_timers())
            if utilization >= 0.1 and disturbed > 0.05:
                pytest.skip(f"{disturbed:.0%} of this machine's timers fire late while nothing runs")
            assert utilization < 0.1
            assert used < 0.02  # 0.3 % on a quiet machine; a busy one makes every wake-up dearer

    run(main())


async def late_timers() -> float:
    """Return the share of an idle loop's timers that fire more than a millisecond late by this machine's own doing."""
    late = 0
    for _ in range(40):
        due = time.perf_counter() + 0.01
        await asyncio.sleep(0.01)
        late += time.perf_counter() - due > 0.002
    return late / 40


def test_gauges_move_while_the_loop_is_stuck(run: Run) -> None:
    """A sample that is taken during a block shows it: delay max and utilization do not wait for its end."""

    async def main() -> None:
        async with measured() as (writer, probe):
            probe._history.clear()
            probe.sample()
            time.sleep(0.3)  # noqa: ASYNC251
            probe.sample()  # the sampling thread does this
            assert writer.value("headroom_event_loop_delay_max_seconds", worker="0") > 0.25
            assert writer.value(UTILIZATION, worker="0") > 0.8

    run(main())


def test_delay_max_is_remembered(run: Run) -> None:
    """The longest delay stays readable after the block is over, for longer than a scrape interval."""

    async def main() -> None:
        async with measured() as (writer, probe):
            began = time.monotonic()
            time.sleep(0.2)  # noqa: ASYNC251
            held = time.monotonic() - began
            await asyncio.sleep(0.05)
            for _ in range(3):
                probe.sample()
            late = writer.value("headroom_event_loop_delay_max_seconds", worker="0")
            assert late == pytest.approx(held - 0.01, abs=0.03)

    run(main())


def test_tasks_are_counted(run: Run) -> None:
    """The number of tasks alive on the loop is written about once a second."""

    async def main() -> None:
        sleepers = [asyncio.create_task(asyncio.sleep(60)) for _ in range(10)]
        async with measured() as (writer, _):
            await until(lambda: ("headroom_event_loop_tasks", (("worker", "0"),)) in writer.samples())
            assert writer.value("headroom_event_loop_tasks", worker="0") == len(asyncio.all_tasks())
        for sleeper in sleepers:
            sleeper.cancel()

    run(main())


def test_without_a_loop_there_are_no_series() -> None:
    """Bound outside a loop (a job worker), the probe writes no series of a loop; `attach` begins."""
    writer, probe = Writer.in_memory(), LoopProbe(Settings())
    probe.bind(writer)
    probe.sample()
    assert not any(name.startswith("headroom_event_loop") for name, _ in writer.samples())

    async def main() -> None:
        probe.attach(asyncio.get_running_loop())
        await until(lambda: total(writer, f"{DELAY}_count") > 2)

    asyncio.run(main())
    probe.close()


def test_loops_that_live_for_one_request_are_left_alone() -> None:
    """Loops that come and go, as those of a test client do, cost no thread each, and have no series."""
    writer, probe = Writer.in_memory(), LoopProbe(Settings())
    probe.bind(writer)

    async def live() -> float:
        began = time.monotonic()
        probe.attach(asyncio.get_running_loop())
        await asyncio.sleep(0.005)
        return time.monotonic() - began

    try:
        lived = [asyncio.run(live()) for _ in range(10)]
        if max(lived) >= SETTLED:
            pytest.skip("the machine had one of them live for longer")
        assert "headroom-watchdog" not in {thread.name for thread in threading.enumerate()}
        assert total(writer, f"{DELAY}_count") == 0
    finally:
        probe.close()


def test_bound_again_it_writes_to_the_new_store(run: Run) -> None:
    """After bind with another writer only that one is written to, by one heartbeat."""

    async def main() -> None:
        async with measured() as (old, probe):
            new = Writer.in_memory()
            probe.bind(new)
            before, began = old.value(f"{DELAY}_count", worker="0"), time.monotonic()
            await asyncio.sleep(0.5)
            beats = (time.monotonic() - began) / 0.0165
            assert old.value(f"{DELAY}_count", worker="0") == before
            assert new.value(f"{DELAY}_count", worker="0") == pytest.approx(beats, rel=0.4)

    run(main())


def test_close_stops_everything(run: Run) -> None:
    """After close nothing is written, a second close is harmless, and the loop ends without complaint."""

    async def main() -> None:
        async with measured() as (writer, probe):
            probe.close()
            before = writer.samples()
            await asyncio.sleep(0.1)
            probe.sample()
            assert writer.samples() == before
            probe.close()

    run(main())


def test_binding_request_is_not_kept_alive(run: Run) -> None:
    """The context in which bind was called, with the request's ledger in it, does not live on in the heartbeat."""
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable")

    class Request:
        pass

    async def first(probe: LoopProbe) -> weakref.ref[Request]:
        request = Request()
        variable.set(request)
        probe.bind(Writer.in_memory())
        return weakref.ref(request)

    async def main() -> None:
        probe = LoopProbe(Settings())
        reference = await asyncio.create_task(first(probe))
        await asyncio.sleep(0.1)
        gc.collect()
        assert reference() is None
        probe.close()

    run(main())
