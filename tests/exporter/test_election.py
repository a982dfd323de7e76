"""One worker exports while no sidecar does: real processes, killed and replaced."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from demo_app.stack.process import accepts, free_port
from fastapi_headroom import settings
from fastapi_headroom.exporter.election import Election
from fastapi_headroom.exporter.locks import EXPORTER_LOCK, SIDECAR_LOCK, is_held
from fastapi_headroom.store.writer import Writer
from tests.exporter.support import Child, answers, candidate, eventually, exporter_pid, get, serving_sidecar


def election_in(directory: Path, port: int = 0) -> Election:
    return Election(settings.load({}, directory=directory, port=port))


def test_one_of_many_serves(tmp_path: Path) -> None:
    """Of three candidates exactly one takes lock and port."""
    elections = [election_in(tmp_path) for _ in range(3)]
    for election in elections:
        election.start()
        election.start()
    eventually(lambda: any(election.url for election in elections), "an election")
    assert sum(election.url is not None for election in elections) == 1
    assert is_held(tmp_path / EXPORTER_LOCK)
    for election in elections:
        election.stop()
        election.stop()
    assert not is_held(tmp_path / EXPORTER_LOCK)


@pytest.mark.alone
def test_when_the_exporting_worker_is_killed_another_takes_over(tmp_path: Path) -> None:
    """Within 2 s of kill -9 another worker answers on the same port, twice over."""
    port = free_port()
    with candidate(tmp_path, port) as a, candidate(tmp_path, port) as b, candidate(tmp_path, port) as c:
        left = {child.pid: child for child in (a, b, c)}
        for _ in range(2):
            eventually(lambda: answers(port), "an answer")
            serving = exporter_pid(port)
            assert serving in left
            os.kill(serving, signal.SIGKILL)
            left.pop(serving).wait()
            took = eventually(lambda: answers(port), "the hand-over", 2.0)
            assert took < 2.0
        assert exporter_pid(port) in left


@pytest.mark.alone
def test_a_sidecar_takes_over_and_gives_back(tmp_path: Path) -> None:
    """A sidecar that starts later gets the port from the elected worker; when it is killed the worker serves again."""
    port = free_port()
    with candidate(tmp_path, port) as worker:
        eventually(lambda: exporter_pid(port) == worker.pid, "the election")
        with serving_sidecar(tmp_path, port) as sidecar:
            eventually(lambda: exporter_pid(port) == sidecar.pid, "the take-over")
            assert get(port).status == 200
            assert not is_held(tmp_path / EXPORTER_LOCK)
            assert "a sidecar serves" in worker.log()
        assert not is_held(tmp_path / SIDECAR_LOCK)
        assert eventually(lambda: answers(port), "the return", 2.0) < 2.0
        assert exporter_pid(port) == worker.pid


def test_while_a_sidecar_runs_nobody_is_elected(tmp_path: Path) -> None:
    """Workers that start beside a sidecar leave lock and port alone."""
    with serving_sidecar(tmp_path, free_port()):
        election = election_in(tmp_path)
        for _ in range(3):
            election._step()
        assert election.url is None
        assert not (tmp_path / EXPORTER_LOCK).exists()


def test_a_taken_port_is_warned_of_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers together warn once, naming the remedy; when the port is free it is served."""
    monkeypatch.setattr("fastapi_headroom.exporter.election._PORT_RETRY_SECONDS", 0.1)
    monkeypatch.setattr("fastapi_headroom.exporter.election.INTERVAL", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        elections = [election_in(tmp_path, port) for _ in range(2)]
        with caplog.at_level(logging.WARNING, "fastapi_headroom"):
            for election in elections:
                election.start()
            eventually(lambda: bool(caplog.records), "the warning")
            threading.Event().wait(0.5)  # several more tries
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"port 127.0.0.1:{port} is in use" in line
    assert "HEADROOM_PORT" in line
    eventually(lambda: answers(port), "the port")
    for election in elections:
        election.stop()
    assert not accepts(port)


def test_a_directory_that_is_made_anew_is_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a deleted file guards nothing: the worker locks the new one."""
    monkeypatch.setattr("fastapi_headroom.exporter.election.INTERVAL", 0.05)
    store = tmp_path / "store"
    store.mkdir()
    election = election_in(store)
    election.start()
    eventually(lambda: election.url is not None, "the election")
    for name in (EXPORTER_LOCK, SIDECAR_LOCK):
        (store / name).unlink()
    eventually(lambda: is_held(store / EXPORTER_LOCK), "the new lock")
    eventually(lambda: election.url is not None, "the election")
    election.stop()


def test_an_absent_directory_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the store could not be made the writer has said so; the election waits without a word."""
    election = election_in(tmp_path / "absent")
    with caplog.at_level(logging.INFO, "fastapi_headroom"):
        election._step()
        election._step()
    assert election.url is None
    assert caplog.records == []


def test_an_exporter_that_ended_by_accident_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Code that closes descriptors which are not its own costs one warning and a second of /metrics."""
    monkeypatch.setattr("fastapi_headroom.exporter.election.INTERVAL", 0.05)
    port = free_port()
    election = election_in(tmp_path, port)
    election.start()
    eventually(lambda: answers(port), "the election")
    assert election._exporter is not None
    election._exporter._server.socket.close()
    eventually(lambda: "started anew" in caplog.text, "the warning")
    eventually(lambda: answers(port), "the new exporter")
    election.stop()


@pytest.mark.alone
def test_stopping_lets_go_of_everything(tmp_path: Path) -> None:
    """Serving and stopping again and again leaves no descriptor and no thread, and takes well under a second."""
    Writer.open(tmp_path)
    others = set(threading.enumerate())

    def once() -> int:
        election = election_in(tmp_path)
        election.start()
        eventually(lambda: election.url is not None, "the election")
        assert election.url is not None
        get(int(election.url.split(":")[2].split("/")[0]))
        began = time.monotonic()
        election.stop()
        assert time.monotonic() - began < 0.5
        eventually(lambda: not set(threading.enumerate()) - others, "the end of every thread")
        return len(list(Path("/proc/self/fd").iterdir()))

    assert len({once() for _ in range(4)}) == 1


FORKING = """
import os, sys, time
from pathlib import Path
from fastapi_headroom import settings
from fastapi_headroom.exporter.election import Election
election = Election(settings.load({}, directory=Path(sys.argv[1]), port=int(sys.argv[2])))
election.start()
while election.url is None:
    time.sleep(0.01)
import http.client
kept = http.client.HTTPConnection("127.0.0.1", int(sys.argv[2]))  # a connection that is open while forking
kept.request("GET", "/metrics")
kept.getresponse().read()
if os.fork() == 0:
    assert election.url is None
    sockets = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and
               os.path.exists(f"/proc/self/fd/{fd}")]
    left = [name for name in sockets if name.startswith("socket:") or "lock" in name or name.endswith(".db")]
    assert len(left) == 1, left  # the client's end
    print("ready", flush=True)
    time.sleep(30)
    os._exit(0)
kept.request("GET", "/healthz")
assert kept.getresponse().read()
print("served", file=sys.stderr, flush=True)
time.sleep(30)
"""


def test_a_forked_child_does_not_keep_port_or_lock(tmp_path: Path) -> None:
    """When a worker that exports has forked and is killed, its child holds neither port nor lock."""
    port = free_port()
    with Child(["-c", FORKING, str(tmp_path), str(port)]) as parent:
        eventually(lambda: "served" in parent.log(), "the parent's answer after the fork")
        (child,) = (int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        try:
            os.kill(parent.pid, signal.SIGKILL)
            parent.process.wait()
            assert not is_held(tmp_path / EXPORTER_LOCK)
            election = election_in(tmp_path, port)
            election.start()
            eventually(lambda: election.url is not None, "the successor")
            election.stop()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_may_stand_itself(tmp_path: Path) -> None:
    """The same election started anew in a forked child works as the child's own."""
    election = election_in(tmp_path)
    election.start()
    eventually(lambda: election.url is not None, "the election")
    pid = os.fork()
    if pid == 0:
        try:
            election.start()
            election.stop()
            os._exit(0 if election.url is None else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert election.url is not None
    assert is_held(tmp_path / EXPORTER_LOCK)
    election.stop()
