"""Blocks of the event loop are noticed, counted in full, and blamed on the right code for the right cause."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fastapi_headroom.driver import Driven
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes import blocks
from tests.probes.loops import (
    BLOCKED,
    BLOCKS,
    RUNS,
    Run,
    measured,
    objects_that_take,
    total,
    undisturbed,
    until,
    verdicts,
)
from tests.support import loop_proofs

pytestmark = pytest.mark.alone

HERE = __name__
Hold = Callable[[float], object]


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def only(found: dict[tuple[str, str], float], least: float = 0.9) -> tuple[str, str, str, float]:
    """Return module, function, cause and seconds of the verdict that has nearly all of the time."""
    (site, cause), seconds = max(found.items(), key=lambda item: item[1])
    assert seconds >= least * sum(found.values()), found
    module, function, line = site.split(":") if site.count(":") == 2 else (site, "", "")
    assert line == "" or int(line) > 0
    return module, function, cause, seconds


async def sleep_on_the_loop() -> None:
    time.sleep(0.3)  # noqa: ASYNC251


async def time_of(fault: Callable[[], Awaitable[None]], took: list[float]) -> None:
    """Run a fault and note how long it really took."""
    began = time.monotonic()
    await fault()
    took.append(time.monotonic() - began)


async def compute_in_python() -> None:
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        pass


async def add_up() -> None:
    total = 0
    for number in range(15_000_000):
        total += number


DOCUMENT = {str(number): list(range(20)) for number in range(250_000)}


async def dump_a_large_document() -> None:
    json.dumps(DOCUMENT)


async def hash_a_password() -> None:
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 800_000)


async def collect_garbage() -> None:
    gc.collect()


def test_sleep_is_io(run: Run) -> None:
    """A time.sleep in a coroutine is blamed on that coroutine, as io, with its whole time."""
    took: list[float] = []
    module, function, cause, seconds = only(undisturbed(run, lambda: time_of(sleep_on_the_loop, took)))
    assert (module, function, cause) == (HERE, "sleep_on_the_loop", "io")
    assert seconds == pytest.approx(took[-1], abs=0.05)


@pytest.mark.parametrize("fault", [compute_in_python, add_up])
def test_busy_loop_is_python(run: Run, fault: Any) -> None:
    """A loop in Python code is blamed on its function, as python, though every sample finds it at one instruction."""
    module, function, cause, _ = only(undisturbed(run, fault))
    assert (module, function, cause) == (HERE, fault.__name__, "python")


def test_call_that_keeps_the_gil_is_native(run: Run) -> None:
    """One large json.dumps stops the watchdog too, and is still counted, as native, at the function that called it."""
    found = undisturbed(run, dump_a_large_document)
    module, function, cause, seconds = only(found)
    assert cause == "native"
    assert (module, function) == (HERE, "dump_a_large_document")
    assert seconds > 0.1


def test_call_that_releases_the_gil_is_native(run: Run) -> None:
    """Hashing a password in C is blamed on its caller, as native."""
    module, function, cause, _ = only(undisturbed(run, hash_a_password))
    assert (module, function, cause) == (HERE, "hash_a_password", "native")


def test_garbage_collection_is_gc(run: Run) -> None:
    """A collection that holds the loop is gc."""
    objects = objects_that_take(0.2)
    *_, cause, seconds = only(undisturbed(run, collect_garbage))
    del objects
    assert cause == "gc"
    assert seconds > 0.08


def test_another_thread_that_keeps_the_gil(run: Run) -> None:
    """When another thread's call in C keeps the GIL, the cause is gil and the site is that thread's code."""
    done = threading.Event()

    def dump_elsewhere() -> None:
        json.dumps(DOCUMENT)
        done.wait(10)

    async def fault() -> None:
        done.clear()
        thread = threading.Thread(target=dump_elsewhere)
        thread.start()
        await asyncio.sleep(0.5)
        done.set()
        thread.join()

    module, function, cause, _ = only(undisturbed(run, fault))
    assert cause == "gil"
    assert (module, function) == (HERE, "test_another_thread_that_keeps_the_gil.dump_elsewhere")


def test_stopped_process_is_starved() -> None:
    """A process that was stopped and continued blames nobody: the cause is starved and no site is named."""
    code = """
import asyncio, json, os, signal
from tests.probes.loops import measured, total, until, verdicts, BLOCKED
async def main():
    async with measured() as (writer, _):
        print("ready", flush=True)
        await until(lambda: total(writer, BLOCKED) > 0.4, 20)
        print(json.dumps([[*key, value] for key, value in verdicts(writer).items()]), flush=True)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGCONT)
        found = {(site, cause): seconds for site, cause, seconds in json.loads(process.stdout.readline())}
    module, _, cause, seconds = only(found)
    assert (module, cause) == ("unknown", "starved")
    assert 0.4 < seconds < 1.5


def test_every_short_block_is_noticed(run: Run) -> None:
    """Twenty of twenty blocks of 120 ms are counted, one each, at the function that made them."""

    async def main() -> float:
        """Return by how much the machine was late at worst."""
        async with measured() as (writer, _):
            late, moment = 0.0, time.monotonic()
            for _ in range(20):
                for seconds in (0.02, 0.12):
                    if seconds < 0.1:
                        await asyncio.sleep(seconds)
                    else:
                        time.sleep(seconds)  # noqa: ASYNC251
                    before, moment = moment, time.monotonic()
                    late = max(late, moment - before - seconds)
            await until(lambda: total(writer, BLOCKS) >= 20)
            mine = "test_every_short_block_is_noticed.main"
            named = sum(seconds for (site, _), seconds in verdicts(writer).items() if mine in site)
            if late < 0.05:
                assert total(writer, BLOCKS) == 20
                assert total(writer, BLOCKED) == pytest.approx(20 * 0.12, rel=0.15)
                assert named >= 0.9 * total(writer, BLOCKED)
            return late

    for _ in range(8):  # a machine that stands still makes blocks of its own
        if run(main()) < 0.05:
            return
    pytest.skip("this machine was late in each of 8 attempts")


def test_50_of_50_blocks_are_noticed(run: Run) -> None:
    """Blocks of 100 ms at random moments, asleep, in Python and in C with the GIL kept: all noticed, and none more."""
    assert run(loop_proofs.notices_blocks(50)) == (50, 0)


def test_blocks_are_noticed_while_the_heartbeat_rests(run: Run) -> None:
    """So are those on a loop on which nothing else happens, which is woken once a second."""
    assert run(loop_proofs.notices_blocks_at_rest(27)) == (27, 0)


@pytest.mark.parametrize("hold", [time.sleep, loop_proofs.compute], ids=["sleeping", "computing"])
def test_block_is_noticed_when_the_resting_heartbeat_falls_due_at_its_end(run: Run, hold: Hold) -> None:
    """A heartbeat that comes in time by its timer proves nothing when a look, or the CPU's time, tells of a block."""

    async def main() -> None:
        async with measured() as (writer, probe):
            heartbeat = probe._heartbeat
            assert heartbeat is not None
            for _ in range(10):  # whatever takes 100 ms of a machine ends a rest, and a rest's timer with it
                await loop_proofs.rested(probe)
                due = heartbeat._timer_due
                await asyncio.sleep(max(0.0, due - 1.05 * loop_proofs.BLOCK - time.monotonic()))
                left = due - time.monotonic()
                if heartbeat._timer_due == due and left >= loop_proofs.BLOCK:
                    break
            else:
                pytest.skip("this machine was late in each of 10 attempts")
            before = total(writer, BLOCKS)
            hold(left)
            await until(lambda: total(writer, BLOCKS) > before)

    run(main())


@pytest.mark.parametrize("hogs", [0, 2])
def test_many_short_steps_are_no_block(run: Run, hogs: int) -> None:
    """A hundred tasks of 2 ms steps make every beat 200 ms late, also beside processes that take the CPU: no code is
    blamed, since no step held the loop for long."""
    with loop_proofs.contention(hogs):
        assert run(loop_proofs.blamed_while_busy(3)) == {}


def test_idle_loop_has_no_blocks(run: Run) -> None:
    """A loop that idles for a second is blamed for nothing: whatever else happens, the process was starved."""

    async def main() -> None:
        async with measured() as (writer, _):
            await asyncio.sleep(1)
            assert {cause for (_, cause) in verdicts(writer)} <= {"starved"}

    run(main())


def test_block_counts_while_it_lasts(run: Run) -> None:
    """The counter grows while the loop is still blocked, so that an alert fires during the block."""

    async def main() -> None:
        async with measured() as (writer, _):
            seen: list[float] = []
            before, lost, began = total(writer, BLOCKS), total(writer, BLOCKED), time.monotonic()
            for _ in range(10):
                time.sleep(0.06)  # noqa: ASYNC251
                seen.append(total(writer, BLOCKED) - lost)
            held = time.monotonic() - began
            assert total(writer, BLOCKS) == before
            assert seen[-1] > seen[5] > 0
            await until(lambda: total(writer, BLOCKS) == before + 1)
            assert total(writer, BLOCKED) - lost == pytest.approx(held, abs=0.1)

    run(main())


def test_sites_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the most sites, further ones are counted as `other`."""
    monkeypatch.setattr(blocks, "SITES", 1)

    async def main() -> None:
        async with measured() as (writer, _):
            await sleep_on_the_loop()
            await until(lambda: total(writer, BLOCKS) >= 1)
            time.sleep(0.2)  # noqa: ASYNC251
            await until(lambda: "other" in {site for site, _ in verdicts(writer)})
            assert len({site for site, _ in verdicts(writer)} - {"other"}) == 1  # the machine's own may have been first

    asyncio.run(main())


LINE = sleep_on_the_loop.__code__.co_firstlineno


def test_log_record(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """One record in ten seconds tells duration, site, cause, route and stack of a block."""

    async def main() -> None:
        async with measured() as (writer, _):
            for count in (1, 2, 3):
                ledger = Ledger("GET")
                ledger.route = "/items/{id}"
                await asyncio.create_task(Driven(sleep_on_the_loop(), ledger))
                await until(lambda count=count: total(writer, BLOCKS) >= count)  # type: ignore[misc]

    with caplog.at_level(logging.WARNING, "fastapi_headroom"):
        run(main())
    records = [record.getMessage() for record in caplog.records if "the event loop" in record.getMessage()]
    assert len(records) == 1
    first = records[0].splitlines()[0]
    assert f"by {HERE}:sleep_on_the_loop:{LINE} (io) while serving /items/{{id}}; innermost first:" in first
    assert f"{__file__}:{LINE + 1} sleep_on_the_loop" in records[0]


def test_loop_that_does_not_run_is_not_blocked() -> None:
    """A loop that is left and entered again was not blocked in between."""
    loop = asyncio.new_event_loop()
    try:
        context = measured()
        writer, _ = loop.run_until_complete(context.__aenter__())
        time.sleep(0.3)
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.run_until_complete(context.__aexit__(None, None, None))
        assert verdicts(writer) == {}
    finally:
        loop.close()


def test_threads_and_hooks_end_with_the_probe() -> None:
    """After close there is no watchdog thread and no callback of the garbage collector left."""
    callbacks = list(gc.callbacks)

    async def main() -> None:
        async with measured():
            assert any(thread.name == "headroom-watchdog" for thread in threading.enumerate())
        assert not any(thread.name == "headroom-watchdog" for thread in threading.enumerate())

    asyncio.run(main())
    assert gc.callbacks == callbacks


def test_forked_child_watches_its_own_loop() -> None:
    """A child that binds after a fork has a heartbeat and a watchdog of its own, which find its blocks."""
    code = """
import asyncio, os, time
from fastapi_headroom.probes.loop import LoopProbe
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer
from tests.probes.loops import BLOCKS, total, until
probe = LoopProbe(Settings())
async def main():
    writer = Writer.in_memory()
    probe.bind(writer)
    await asyncio.sleep(0.1)
    time.sleep(0.2)
    await until(lambda: total(writer, BLOCKS) > 0)
asyncio.run(main())
child = os.fork()
asyncio.run(main())
probe.close()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
