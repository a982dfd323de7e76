"""Files that make the loop's thread wait are counted by site; ``open`` and the file objects are as they always were."""

from __future__ import annotations

import asyncio
import builtins
import fcntl
import io
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastapi_headroom.probes.blocking_places import REMEDIES
from fastapi_headroom.probes.file_calls import _PATH_CALLS, SUPPORTED, FileCalls, is_file_call
from fastapi_headroom.probes.procfs import ThreadStat
from fastapi_headroom.store.writer import Writer
from tests.probes.loops import RUNS, Run, measured, until

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the numbers of this machine's system calls are not known")
CALLS = "headroom_blocking_calls_total"
SLOW = 0.25
"""Seconds that a file takes."""


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def counted(writer: Writer) -> dict[tuple[str, str], float]:
    """Return (kind, function) -> calls."""
    found: dict[tuple[str, str], float] = {}
    for (sample, pairs), value in writer.samples().items():
        if sample == CALLS:
            labels = dict(pairs)
            found[labels["kind"], labels["site"].split(":")[1].rpartition(".")[2]] = value
    return found


def later(action: Callable[[], Any]) -> threading.Thread:
    """Do something on a thread, when the loop has waited for it for a while."""
    thread = threading.Thread(target=lambda: (threading.Event().wait(SLOW), action()))
    thread.start()
    return thread


def open_a_slow_file(folder: Path) -> None:
    """``open`` waits for somebody who writes."""
    path = folder / "opened"
    os.mkfifo(path)
    other = later(lambda: path.write_bytes(b"x"))
    with open(path, "rb") as file:  # noqa: PTH123
        assert file.read() == b"x"
    other.join()


def read_a_slow_file(_: Path) -> None:
    """``read`` waits for what comes."""
    reading, writing = os.pipe()
    other = later(lambda: os.close(writing))
    with os.fdopen(reading) as file:
        assert file.read() == ""
    other.join()


def write_to_a_slow_file(_: Path) -> None:
    """``write`` waits until somebody takes what is there: as a log does whose lines nobody reads."""
    reading, writing = os.pipe()
    other = later(lambda: os.read(reading, 1 << 20))
    with os.fdopen(writing, "wb", buffering=0) as file:
        file.write(b"x" * fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ))  # it is full now
        file.write(b"x")
    other.join()
    os.close(reading)


@pytest.mark.parametrize("use", [open_a_slow_file, read_a_slow_file, write_to_a_slow_file])
def test_a_slow_file_counts_once_at_its_site(run: Run, use: Callable[[Path], None], tmp_path: Path) -> None:
    """A call that opens, reads or writes a file which is not ready counts once, at the function that makes it."""

    async def main() -> None:
        async with measured() as (writer, _):
            use(tmp_path)
            await until(lambda: counted(writer))
            await asyncio.sleep(0.05)
            assert counted(writer) == {("file", use.__name__): 1}

    run(main())


def test_what_is_no_call_on_a_file(run: Run, tmp_path: Path) -> None:
    """A socket that blocks, a wait for a lock, a computation, and a slow file in a thread are no file calls."""
    ready, silent = socket.socketpair()
    ready.settimeout(SLOW)

    def ask_a_socket() -> None:
        with pytest.raises(TimeoutError):
            ready.recv(1)
        ready.setblocking(True)
        other = later(lambda: silent.send(b"x"))
        os.read(ready.fileno(), 1)
        other.join()

    async def main() -> None:
        async with measured() as (writer, _):
            ask_a_socket()
            threading.Event().wait(SLOW)
            sum(range(5_000_000))
            await asyncio.to_thread(read_a_slow_file, tmp_path)
            await asyncio.sleep(0.05)
            assert counted(writer) == {}

    with ready, silent:
        run(main())


def test_the_log_tells_line_and_remedy(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The first call of a site is logged, with the line that made it and what to use instead."""

    async def main() -> None:
        async with measured() as (writer, _):
            read_a_slow_file(tmp_path)
            await until(lambda: counted(writer))

    with caplog.at_level(logging.WARNING, "fastapi_headroom"):
        asyncio.run(main())
    (record,) = [line for line in caplog.messages if "(file)" in line]
    line = read_a_slow_file.__code__.co_firstlineno + 5
    assert f"read_a_slow_file:{line - 5} (line {line}) makes a blocking call (file)" in record
    assert REMEDIES["file"] in record


def test_open_is_the_interpreters_own() -> None:
    """While the probe is on, ``open`` is what it was: the same object under all its names, picklable, of C."""
    before = (builtins.open, io.open, os.open, os.read)

    async def main() -> None:
        async with measured():
            assert (builtins.open, io.open, os.open, os.read) == before
            assert io.open is builtins.open
            assert pickle.loads(pickle.dumps(open)) is open
            assert isinstance(open, type(len))

    asyncio.run(main())
    assert (builtins.open, io.open, os.open, os.read) == before


def test_which_system_calls_are_calls_on_files(tmp_path: Path) -> None:
    """A thread that sleeps in a read is in a call on a file, unless the descriptor is that of a socket."""
    found: dict[str, bool] = {}
    ids: dict[str, int] = {}
    reading, writing = os.pipe()
    one, other = socket.socketpair()

    def read(name: str, descriptor: int) -> None:
        ids[name] = threading.get_native_id()
        os.read(descriptor, 1)

    threads = [threading.Thread(target=read, args=it) for it in (("pipe", reading), ("socket", one.fileno()))]
    for thread in threads:
        thread.start()
    for name in ("pipe", "socket"):
        while name not in ids:
            pass
        stat = ThreadStat(ids[name])
        while (call := stat.system_call()) == "running":
            pass
        found[name] = is_file_call(call)
        stat.close()
    os.write(writing, b"x")
    other.send(b"x")
    for thread in threads:
        thread.join()
    one.close(), other.close(), os.close(reading), os.close(writing)
    assert found == {"pipe": True, "socket": False}
    assert not is_file_call("running")
    assert not is_file_call(None)


def test_a_call_counts_once_and_only_when_it_lasts() -> None:
    """Looks at one step must find it in file calls for 10 ms; another step, or another call, begins anew."""
    calls, path = FileCalls(), next(iter(_PATHS))
    assert not calls.lasts(path, False, 1.0)
    assert not calls.lasts(path, True, 1.005)
    assert calls.lasts(path, True, 1.011)
    assert not calls.lasts(path, True, 1.1)
    assert not calls.lasts(path, False, 1.2)
    assert not calls.lasts("running", True, 1.205)
    assert not calls.lasts(path, True, 1.211)
    assert calls.lasts(path, True, 1.222)


_PATHS = [f"{number} 0x0" for number in _PATH_CALLS]
