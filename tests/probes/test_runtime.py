"""The process's figures are those of the operating system."""

from __future__ import annotations

import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.runtime import RuntimeProbe
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer
from tests.support.measured import best_of


@pytest.fixture
def bound() -> Iterator[tuple[Writer, RuntimeProbe]]:
    writer = Writer.in_memory()
    probe = RuntimeProbe(Settings(service_name="shop", service_version="1.2"))
    probe.guard.bind(writer)
    probe.bind(writer)
    yield writer, probe
    probe.close()
    assert writer.value("headroom_probe_errors_total", probe="runtime") == 0


def test_memory_grows_with_what_is_held(bound: tuple[Writer, RuntimeProbe]) -> None:
    """32 MB that are touched show in the resident memory, which stays below its limit."""
    writer, probe = bound
    before = writer.value("process_resident_memory_bytes", worker="0")
    block = b"x" * 32_000_000
    probe.sample()
    grown = writer.value("process_resident_memory_bytes", worker="0") - before
    assert grown == pytest.approx(len(block), rel=0.2)
    assert writer.value("headroom_process_memory_limit_bytes", worker="0") > before + grown


def test_cpu_counts_what_was_used(bound: tuple[Writer, RuntimeProbe]) -> None:
    """100 ms of CPU are 100 ms in the counter; bound again, nothing is counted twice."""
    writer, probe = bound
    before = writer.value("process_cpu_seconds_total", worker="0")
    assert before == pytest.approx(time.process_time(), abs=0.1)
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    probe.sample()
    assert writer.value("process_cpu_seconds_total", worker="0") - before == pytest.approx(0.1, abs=0.03)
    probe.bind(writer)
    assert writer.value("process_cpu_seconds_total", worker="0") == pytest.approx(time.process_time(), abs=0.05)


def test_descriptors(bound: tuple[Writer, RuntimeProbe]) -> None:
    """Ten more open files are ten more descriptors, of as many as the system allows."""
    writer, probe = bound

    def grown() -> float:
        probe.sample()
        before = writer.value("process_open_fds", worker="0")
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
        probe.sample()
        for descriptor in opened:
            os.close(descriptor)
        return writer.value("process_open_fds", worker="0") - before

    assert best_of(grown, lambda found: found == 10) == 10  # another test's may be given back meanwhile
    assert writer.value("process_max_fds", worker="0") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_start_time(bound: tuple[Writer, RuntimeProbe]) -> None:
    """The start lies in the past, and by as much as the process's own clock says."""
    writer, _ = bound
    started = writer.value("process_start_time_seconds", worker="0")
    assert time.time() - 3600 < started < time.time()
    assert Path(f"/proc/{os.getpid()}").stat().st_ctime == pytest.approx(started, abs=120)


def test_collections_and_pauses(bound: tuple[Writer, RuntimeProbe]) -> None:
    """Each collection is counted in its generation and its pause is observed, from any thread."""
    writer, probe = bound
    counted = writer.value("cpython_gc_collections_total", cpython_gc_generation="2")
    paused = writer.value("headroom_gc_pause_seconds_count", worker="0")
    gc.collect()
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    probe.sample()
    assert writer.value("cpython_gc_collections_total", cpython_gc_generation="2") - counted == 2
    assert writer.value("headroom_gc_pause_seconds_count", worker="0") - paused >= 2
    assert writer.value("headroom_gc_pause_seconds_sum", worker="0") > 0


def test_accept_backlog() -> None:
    """Connections that nobody accepts are counted by port; a port that is closed has none, and is really closed."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        port = server.getsockname()[1]
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        writer, probe = Writer.in_memory(), RuntimeProbe(Settings())
        probe.bind(writer)
        try:
            assert writer.value("headroom_accept_backlog", port=str(port)) == 3
            server.accept()[0].close()
            probe.sample()
            assert writer.value("headroom_accept_backlog", port=str(port)) == 2
            server.close()
            probe.sample()
            assert writer.value("headroom_accept_backlog", port=str(port)) == 0
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        finally:
            probe.close()
            for client in clients:
                client.close()


def test_info_says_what_runs(bound: tuple[Writer, RuntimeProbe]) -> None:
    """One series of value 1 carries service and versions."""
    writer, _ = bound
    (labels,) = (dict(pairs) for name, pairs in writer.samples() if name == "headroom_app_info")
    assert labels["service_name"] == "shop"
    assert labels["service_version"] == "1.2"
    assert labels["python"].startswith("3.")
    assert labels["fastapi"][0].isdigit()


def test_close_detaches() -> None:
    """After close the garbage collector calls nothing of ours, and a second close is harmless."""
    before = list(gc.callbacks)
    probe = RuntimeProbe(Settings())
    probe.bind(Writer.in_memory())
    assert len(gc.callbacks) == len(before) + 1
    probe.bind(Writer.in_memory())
    assert len(gc.callbacks) == len(before) + 1
    probe.close()
    probe.close()
    probe.sample()
    assert gc.callbacks == before


def test_forked_child_counts_its_own_cpu() -> None:
    """A child that binds after a fork counts from its own start, not from what the parent had used."""
    probe = RuntimeProbe(Settings())
    probe.bind(Writer.in_memory())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writer = Writer.in_memory()
            probe.bind(writer)
            code = 0 if 0 <= writer.value("process_cpu_seconds_total", worker="0") < 0.5 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    probe.close()


def proc_of(tmp_path: Path, *, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """Write a /proc and control groups as the kernel would, and return the /proc."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:        4000000 kB\nMemFree: 1 kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    (proc / "self" / "mounts").write_text(mounts.replace("@", str(tmp_path)))
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


V1_MOUNT = "cgroup @/cg/memory cgroup rw,relatime,memory 0 0\n"
V2_MOUNT = "cgroup2 @/cg cgroup2 rw 0 0\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "limit"),
    [
        ("0::/app/web\n", V2_MOUNT, {"cg/app/memory.max": "1000000\n", "cg/app/web/memory.max": "max\n"}, 1_000_000),
        ("0::/app\n", V2_MOUNT, {"cg/app/memory.max": "max\n"}, 4_096_000_000),
        ("0::/../host/path\n", V2_MOUNT, {"cg/memory.max": "2000000\n"}, 2_000_000),
        ("4:memory:/app\n", V1_MOUNT, {"cg/memory/app/memory.limit_in_bytes": "3000000\n"}, 3_000_000),
        ("4:memory:/app\n", V1_MOUNT, {"cg/memory/app/memory.limit_in_bytes": "9223372036854771712"}, 4_096_000_000),
        ("4:memory:/docker/id\n", V1_MOUNT, {"cg/memory/memory.limit_in_bytes": "5000000\n"}, 5_000_000),
        ("", "", {}, 4_096_000_000),
    ],
    ids=["v2-parent", "v2-none", "v2-container", "v1", "v1-none", "v1-container", "machine"],
)
def test_memory_limit(tmp_path: Path, groups: str, mounts: str, files: dict[str, str], limit: int) -> None:
    """The limit is the least of the control groups' above the process, else the machine's memory."""
    assert procfs.memory_limit(proc_of(tmp_path, groups=groups, mounts=mounts, files=files)) == limit


def test_without_proc_there_are_no_figures(tmp_path: Path) -> None:
    """Where the system tells nothing the answer is nothing, and no error."""
    nowhere = tmp_path / "nowhere"
    assert procfs.resident_memory(nowhere) is None
    assert procfs.open_descriptors(nowhere) is None
    assert procfs.start_time(nowhere) is None
    assert procfs.memory_limit(nowhere) is None
    assert procfs.socket_descriptors(100, nowhere) == []
    thread = procfs.ThreadStat(1, nowhere)
    assert thread.times() is None
    assert thread.system_call() is None
    thread.close()
