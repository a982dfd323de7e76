"""assert_no_blocking: a user's test fails when it holds its event loop, whatever runs the loop, and only then."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_headroom import pytest_plugin
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.testing import assert_no_blocking
from tests.probes.loops import RUNS, Run, objects_that_take, robbed_during
from tests.support.measured import best_of, busy

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]
HERE = __name__
DOCUMENT = {str(number): list(range(20)) for number in range(150_000)}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


async def sleep_between_awaits() -> None:
    await asyncio.sleep(0.02)
    time.sleep(0.15)  # noqa: ASYNC251
    await asyncio.sleep(0.02)


async def sleep_at_once() -> None:
    time.sleep(0.15)  # noqa: ASYNC251


async def dump_json() -> None:
    gc.disable()
    json.dumps(DOCUMENT)
    gc.enable()


async def compute() -> None:
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass


def failure_of(run: Run, main: Callable[[], Coroutine[Any, Any, None]], attempts: int = 12) -> str:
    """Return what the assertion says when the process was not robbed of its CPU by others."""
    said: list[str] = []

    def attempt() -> None:
        try:
            run(main())
            said.append("nothing was found")
        except AssertionError as failure:
            said.append(str(failure))

    for _ in range(attempts):
        if robbed_during(attempt) < 0.1:
            return said[-1]
    pytest.skip(f"other processes took the CPU in each of {attempts} attempts")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(sleep_between_awaits, "io"), (sleep_at_once, "io"), (dump_json, "native"), (compute, "python")],
)
@pytest.mark.parametrize("kind", ["with", "async with"])
def test_block_is_named(run: Run, fault: Callable[[], Coroutine[Any, Any, None]], cause: str, kind: str) -> None:
    """The message has the duration, the site, the cause and the stack, also of a block without an await around it."""

    async def main() -> None:
        if kind == "with":
            with assert_no_blocking(threshold_ms=50):
                await fault()
        else:
            async with assert_no_blocking(threshold_ms=50):
                await fault()

    message = failure_of(run, main)
    first = message.splitlines()[0]
    line = fault.__code__.co_firstlineno
    assert first.startswith(("the event loop was blocked 0.", "the event loop was blocked 1."))
    assert "at most 0.05 s is allowed" in first
    assert f" s by {HERE}:{fault.__name__}:{line} ({cause})" in first
    assert f"{__file__}:" in message and fault.__name__ in message.split("innermost first:")[1]


def test_duration_is_right(run: Run) -> None:
    """A hold of 150 ms is told as 150 ms, to 10 ms."""

    held = 0.0

    async def main() -> None:
        nonlocal held
        with assert_no_blocking():
            await asyncio.sleep(0.02)
            began = time.perf_counter()
            time.sleep(0.15)  # noqa: ASYNC251
            held = time.perf_counter() - began
            await asyncio.sleep(0.02)

    def off() -> float:
        return float(failure_of(run, main).split("blocked ")[1].split()[0]) - held

    assert best_of(off, lambda seconds: abs(seconds) <= 0.01) == pytest.approx(0.0, abs=0.01)


async def nothing_blocks() -> None:
    """500 tasks of many steps of a millisecond: busy all the time, and every beat is late."""

    async def work() -> None:
        for _ in range(3):
            busy(0.0002)
            await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(500)))
    await asyncio.sleep(0.1)


def test_free_and_busy_loops_pass(run: Run) -> None:
    """A loop that runs many short steps without a pause passes, though what is due on it comes late."""

    async def main() -> None:
        with assert_no_blocking(threshold_ms=50):
            await nothing_blocks()

    run(main())


def test_what_it_does_itself_to_begin_is_not_the_tests(run: Run) -> None:
    """The loops that run are looked for among all objects there are, which takes a while, and no block of anybody's."""
    objects = objects_that_take(0.4)

    async def main() -> None:
        with assert_no_blocking(threshold_ms=50):
            await asyncio.sleep(0)

    run(main())
    del objects


def test_loop_that_the_collector_does_not_know_is_watched(run: Run) -> None:
    """The loop of the test itself is watched, also after a gc.freeze()."""

    async def main() -> None:
        gc.freeze()
        with assert_no_blocking(threshold_ms=50):
            await sleep_at_once()

    assert f"{HERE}:sleep_at_once:" in failure_of(run, main)


def test_starved_process_passes() -> None:
    """Other processes that take the CPU, and one that is stopped for a while, fail nothing."""
    code = """
import asyncio, os, signal, subprocess, sys
from fastapi_headroom.testing import assert_no_blocking
from tests.test_no_blocking import nothing_blocks
async def main():
    stop = f"import os, signal, time; time.sleep(0.5); os.kill({os.getpid()}, 19); time.sleep(0.3); "
    stop += f"os.kill({os.getpid()}, 18)"
    with assert_no_blocking(threshold_ms=50):
        stopper = await asyncio.create_subprocess_exec(sys.executable, "-c", stop)
        await stopper.wait()
        await nothing_blocks()
asyncio.run(main())
"""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert done.returncode == 0, done.stderr


def make_app() -> FastAPI:
    app = FastAPI()

    @app.get("/quote")
    async def quote() -> str:
        time.sleep(0.15)  # noqa: ASYNC251
        return "blocked"

    @app.get("/threaded")
    def threaded() -> str:
        time.sleep(0.15)
        return "in a thread"

    return app


def test_loops_of_test_clients_are_watched() -> None:
    """TestClient's loop, in a thread of its own, is watched: one that runs already, and one that is made inside."""
    app = make_app()
    client = TestClient(app)
    with pytest.raises(AssertionError, match=rf"{HERE}:make_app.quote:\d+ \(io\)"), assert_no_blocking():
        assert client.get("/quote").status_code == 200
    with TestClient(app) as client:
        with pytest.raises(AssertionError, match=r"make_app.quote"), assert_no_blocking():
            client.get("/quote")
        with assert_no_blocking():
            assert client.get("/threaded").json() == "in a thread"


def test_blocks_nest_and_each_has_its_threshold(run: Run) -> None:
    """A block within a block fails on its own terms; the outer one, which allows more, passes."""

    async def main() -> None:
        with assert_no_blocking(threshold_ms=1000):
            with pytest.raises(AssertionError), assert_no_blocking(threshold_ms=20):
                await sleep_between_awaits()
            with assert_no_blocking(threshold_ms=500):
                await sleep_between_awaits()

    run(main())


def test_what_the_test_raised_is_what_is_seen(run: Run) -> None:
    """An exception in the body is not replaced by ours."""

    async def main() -> None:
        with assert_no_blocking():
            await sleep_between_awaits()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(main())


@pytest.mark.parametrize("wrong", [0, -1, 5, float("nan"), float("inf"), "50", None, True])
def test_wrong_threshold(wrong: Any) -> None:
    """A threshold that cannot be is refused with the remedy, when the helper is made."""
    with pytest.raises(SettingsError, match="threshold_ms must be"):
        assert_no_blocking(threshold_ms=wrong)


def test_nothing_is_left_behind(run: Run) -> None:
    """After the block no thread, no callback of the collector and no wrapped method is left."""
    threads, callbacks = threading.active_count(), list(gc.callbacks)
    before = asyncio.BaseEventLoop.run_forever

    async def main() -> None:
        with assert_no_blocking():
            assert threading.active_count() > threads
            await asyncio.sleep(0.02)
        assert threading.active_count() == threads

    run(main())
    assert gc.callbacks == callbacks
    assert asyncio.BaseEventLoop.run_forever is before


INNER = """
import asyncio, time
import anyio, pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from fastapi_headroom.testing import assert_no_blocking as allow

app = FastAPI()

@app.get("/")
async def index() -> None:
    began = time.monotonic()
    time.sleep(0.2)
    print(f"held {time.monotonic() - began:.3f} s")

async def slow() -> None:
    await asyncio.sleep(0.01)
    began = time.monotonic()
    time.sleep(0.2)
    print(f"held {time.monotonic() - began:.3f} s")

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
async def slow_start():
    await slow()

@pytest.mark.asyncio
async def test_asyncio_bad(assert_no_blocking):
    await slow()

@pytest.mark.asyncio
async def test_asyncio_good(assert_no_blocking):
    await asyncio.sleep(0.2)

@pytest.mark.asyncio
@pytest.mark.assert_no_blocking(threshold_ms=20)
async def test_marker_bad():
    await slow()

@pytest.mark.asyncio
@pytest.mark.assert_no_blocking(1000)
async def test_marker_good():
    await slow()

@pytest.mark.anyio
async def test_anyio_bad(assert_no_blocking):
    await slow()

@pytest.mark.anyio
async def test_anyio_good(assert_no_blocking):
    await anyio.sleep(0.2)

def test_client_bad(assert_no_blocking):
    TestClient(app).get("/")

def test_client_good():
    TestClient(app).get("/")

@pytest.mark.asyncio
async def test_value_good(assert_no_blocking):
    with assert_no_blocking(10):
        await asyncio.sleep(0)

@pytest.mark.asyncio
async def test_context_bad():
    async with allow(threshold_ms=100):
        await slow()
"""


def test_fixture_and_marker_in_a_real_pytest(tmp_path: Path) -> None:
    """In pytest-asyncio, anyio and plain tests just those that block fail, in the call phase, naming the site."""
    (tmp_path / "test_inner.py").write_text(INNER)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n"
    )
    installed = any(
        point.value == pytest_plugin.__name__ for point in importlib.metadata.entry_points(group="pytest11")
    )
    plugin = [] if installed else ["-p", pytest_plugin.__name__]
    command = [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-rA", *plugin, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    failed = {line.split("::")[1].split()[0] for line in lines if line.startswith("FAILED")}
    passed = {line.split("::")[1].split()[0] for line in lines if line.startswith("PASSED")}
    names = [part.split("(")[0] for part in INNER.split("def ")[1:] if part.startswith("test_")]
    assert failed == {name for name in names if name.endswith("_bad")}, done.stdout
    assert passed == {name for name in names if name.endswith("_good")}, done.stdout
    assert not any(line.startswith("ERROR") for line in lines)
    blocked = re.findall(r"AssertionError: the event loop was blocked (0\.\d+) s by", done.stdout)
    longest = max(map(float, re.findall(r"^held ([\d.]+) s$", done.stdout, re.MULTILINE)))
    assert blocked and all(0.15 < float(seconds) < longest + 0.1 for seconds in blocked), done.stdout
    assert "by test_inner:slow:" in done.stdout and "by test_inner:index:" in done.stdout


def test_the_plugin_is_declared_and_costs_nothing() -> None:
    """The entry point names the plugin, and loading that imports nothing of the rest of the package."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert points == {"headroom": pytest_plugin.__name__}
    code = "import sys, fastapi_headroom.pytest_plugin; print([n for n in sys.modules if n.startswith('fastapi')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['fastapi_headroom', 'fastapi_headroom.pytest_plugin']"
