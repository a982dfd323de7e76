"""One child process: started in a group of its own, watched until ready, stopped without leaving anything."""

from __future__ import annotations

import ctypes
import http.client
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

PR_SET_PDEATHSIG = 1


class ProcessError(RuntimeError):
    """A process did not start, or ended by itself; the message ends with its last log lines."""


_ports = itertools.count(random.SystemRandom().randrange(12_000))


def free_port() -> int:
    """Return a loopback port that nobody listens on now, and that this process was not given before.

    It lies below the ports that the system gives to connections and to those who ask for any, so nobody takes it
    before the server that it is for; several processes that ask begin at random places.
    """
    for number in _ports:
        port = 20_000 + number % 12_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("the ports never end")


def accepts(port: int) -> bool:
    """Return whether something accepts connections on the loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def greets(port: int, hello: bytes, answer: bytes = b"") -> bool:
    """Return whether whoever listens on the loopback port answers to ``hello`` within a second.

    ``answer`` is the byte that it has to begin with; without one any will do.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(hello)
            said = connection.recv(1)
            return said == answer if answer else bool(said)
    except OSError:
        return False


def answers(url: str) -> bool:
    """Return whether a GET of the URL succeeds within a second."""
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (OSError, http.client.HTTPException):
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds; raise TimeoutError naming ``what`` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


def _die_with_parent(number: int) -> None:
    """Ask Linux to signal this process when its parent is gone, so that even ``kill -9`` leaves nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _lives(group: int) -> bool:
    """Return whether a process of the group has not ended; one that ended and that nobody reaped has."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    if sys.platform != "linux":
        return True
    return any(_is_at_work(folder, group) for folder in Path("/proc").glob("[0-9]*"))


def _is_at_work(folder: Path, group: int) -> bool:
    try:
        state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        # The first thread may be done before the others, which hold the process' files as well.
        return int(its_group) == group and (state not in "ZX" or len(list((folder / "task").iterdir())) > 1)
    except OSError:  # ended meanwhile
        return False


class Process:
    """A child process with a log file. ``stop_signal`` ends it in order; SIGKILL follows after ``grace`` seconds."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        ready: Callable[[], bool] | None = None,
        stop_signal: int = signal.SIGTERM,
        grace: float = 10.0,
    ) -> None:
        self.name, self.command, self.log_file = name, [str(word) for word in command], log
        self.cwd, self.env, self.user = cwd, env, user
        self.ready, self.stop_signal, self.grace = ready, stop_signal, grace
        self.child: subprocess.Popen[bytes] | None = None
        self.halted = False

    def start(self, timeout: float = 30.0) -> None:
        """Start and wait until ready. Call it on the main thread: the child dies with the thread that made it."""
        self.halted = False
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self.child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env=dict(self.env) if self.env is not None else None,
                user=self.user,
                group=self.user,
                extra_groups=[] if self.user else None,
                start_new_session=True,
                preexec_fn=lambda: _die_with_parent(self.stop_signal),
            )
        if self.ready is None:
            return
        deadline = time.monotonic() + timeout
        while not self.ready():
            if self.child.poll() is not None:
                raise ProcessError(f"{self.name} ended at once (status {self.child.returncode}):\n{self.tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise ProcessError(f"{self.name} was not ready after {timeout:g} s:\n{self.tail()}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The process id; raises ProcessError before the start."""
        if self.child is None:
            raise ProcessError(f"{self.name} was not started")
        return self.child.pid

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self.child is not None and self.child.poll() is None

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        text = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def halt(self) -> None:
        """End the process for a while: ``start`` goes on with the data that it has. Idempotent."""
        self.halted = True
        Process.stop(self)

    def stop(self) -> None:
        """End the process and its whole group, and wait until none of it holds a connection. Idempotent.

        A grandchild that was told to die and has not yet is still served: Redis gives it the next job of its queue.
        """
        child, self.child = self.child, None
        if child is None:
            return
        if child.poll() is None:
            child.send_signal(self.stop_signal)
            try:
                child.wait(self.grace)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        child.wait()
        wait_until(lambda: not _lives(child.pid), 30, f"the end of all processes of {self.name}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
