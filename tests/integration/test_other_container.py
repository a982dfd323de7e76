"""A sidecar in another container: real namespaces of Linux, other user ids, nothing shared but the store's volume.

What a container is to the store: PID, mount, IPC and UTS namespaces of its own and a user id of its own. The network is
shared, as it is in a pod. Each process here is number 1 of its namespace.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.stack.process import Process, accepts, free_port, wait_until
from tests.exporter.support import answers, get
from tests.support.serving import ROOT, Serving

UNSHARE = ("unshare", "--fork", "--pid", "--mount-proc", "--ipc", "--uts", "--mount")
APP_USER, SIDECAR_USER, GROUP = 61_001, 61_002, 62_000
NAMESPACES = ("pid", "mnt", "ipc", "uts")
PING = 'headroom_requests_total{http_route="/ping",outcome="ok"}'


def _hindrance() -> str:
    """Return why namespaces cannot be had here, or nothing."""
    if os.geteuid() != 0:
        return "only root can make namespaces and become other users"
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        return "unshare and setpriv of util-linux are needed"
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return f"namespaces are not allowed here: {tried.stderr.decode().strip()}" if tried.returncode else ""


HINDRANCE = _hindrance()
pytestmark = pytest.mark.skipif(bool(HINDRANCE), reason=HINDRANCE)


class Containers:
    """Starts processes in containers of their own; ``volume`` is what they share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.volume = folder / "volume"
        self.volume.mkdir()
        os.chown(self.volume, 0, GROUP)
        self.volume.chmod(0o2775)  # as fsGroup leaves it
        self.port = free_port()
        self._stack = contextlib.ExitStack()

    def process(self, name: str, user: int, groups: tuple[int, ...], *command: str, **variables: str) -> Process:
        """Make a process that sees the volume as /NAME-volume below the folder."""
        script = self._folder / f"{name}.sh"
        script.write_text(self._script(name, user, groups, [sys.executable, *command]))
        variables = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "instrumentation")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HEADROOM_DIRECTORY": str(self.seen_by(name)),
            "HEADROOM_PORT": str(self.port),
            **variables,
        }
        log = self._folder / f"{name}.log"
        process = Process(name, [*UNSHARE, "sh", "-e", script], log=log, env=variables, stop_signal=signal.SIGKILL)
        self._stack.callback(process.stop)
        return process

    def app(self, name: str, **variables: str) -> Serving:
        """Start uvicorn with one worker."""
        port = free_port()
        command = ("-m", "uvicorn", "tests.support.app:app", "--port", str(port), "--log-level", "warning")
        process = self.process(name, APP_USER, (GROUP,), *command, **variables)
        process.ready = lambda: accepts(port)
        process.start()
        return Serving(process, port, self.seen_by(name))

    def sidecar(self, *, groups: tuple[int, ...] = (GROUP,)) -> Process:
        """Start the sidecar, whether it can serve or not."""
        process = self.process("sidecar", SIDECAR_USER, groups, "-m", "fastapi_headroom.cli", "sidecar")
        process.start()
        return process

    def seen_by(self, name: str) -> Path:
        """Return where a container has the store: elsewhere in each."""
        return self._folder / f"{name}-volume" / "store"

    def close(self) -> None:
        self._stack.close()

    def _script(self, name: str, user: int, groups: tuple[int, ...], command: list[str]) -> str:
        quoted = shlex.join
        lines = [quoted(["hostname", name])]
        image = [Path(sys.base_prefix), Path(sys.prefix), ROOT]
        closed = {parent for path in image for parent in path.resolve().parents if not parent.stat().st_mode & 0o001}
        # An interpreter below a home that others may not enter would be in no container's image either.
        for home in sorted(closed)[:1]:
            inside = [path.resolve() for path in image if path.resolve().is_relative_to(home)]
            copies = [self._folder / f"{name}-image-{number}" for number in range(len(inside))]
            for path, copy in zip(inside, copies, strict=True):
                lines += [quoted(["mkdir", str(copy)]), quoted(["mount", "--bind", str(path), str(copy)])]
            lines += [quoted(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(home)])]
            for path, copy in zip(inside, copies, strict=True):
                lines += [quoted(["mkdir", "-p", str(path)]), quoted(["mount", "--bind", str(copy), str(path)])]
        view = self.seen_by(name).parent
        view.mkdir(exist_ok=True)
        lines += [quoted(["mount", "--bind", str(self.volume), str(view)])]
        # Nothing else is shared: not the folder that the volume lies in, nor shared memory.
        lines += [quoted(["mount", "-t", "tmpfs", "tmpfs", place]) for place in (str(self.volume), "/dev/shm")]
        member = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
        lines += ["cd /", quoted(["exec", "setpriv", "--reuid", str(user), "--regid", str(user), *member, *command])]
        return "\n".join([*lines, ""])


@pytest.fixture
def containers() -> Iterator[Containers]:
    with tempfile.TemporaryDirectory(prefix="headroom-test-") as name:
        Path(name).chmod(0o755)
        made = Containers(Path(name))
        try:
            yield made
        finally:
            made.close()


def inside(process: Process) -> int:
    """Return the number that the first process of a namespace has outside."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def namespaces(pid: int) -> set[str]:
    return {str(Path(f"/proc/{pid}/ns/{name}").readlink()) for name in NAMESPACES}


def sample(port: int, series: str) -> float | None:
    lines = (line.rpartition(" ") for line in get(port).text.splitlines())
    return next((float(value) for name, _, value in lines if name == series), None)


def test_a_sidecar_in_another_container_tells_living_workers_from_dead_ones(containers: Containers) -> None:
    """Two apps and a sidecar, each process 1 of namespaces of its own: sums are right, a killed app is seen dead, and
    its successor goes on from its counts."""
    first = containers.app("first", HEADROOM_GROUP_READABLE="true")
    second = containers.app("second", HEADROOM_GROUP_READABLE="true")
    # An elected worker provides the lock files, before the sidecar of another user comes.
    wait_until(lambda: answers(containers.port), 60, "the elected worker")
    sidecar = containers.sidecar()
    wait_until(lambda: (containers.volume / "store" / "sidecar.lock").exists(), 60, "the lock file")
    wait_until(lambda: "metrics at" in sidecar.tail() and answers(containers.port), 60, "the sidecar")

    processes = [inside(process) for process in (first.process, second.process, sidecar)]
    seen = [namespaces(pid) for pid in (os.getpid(), *processes)]
    assert len(set.union(*seen)) == len(NAMESPACES) * 4
    users = [Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0] for pid in processes]
    assert users == [str(APP_USER), str(APP_USER), str(SIDECAR_USER)]

    assert [first.get("/ping") for _ in range(5)] == ['{"pid":1}'] * 5
    assert [second.get("/ping") for _ in range(3)] == ['{"pid":1}'] * 3
    assert sample(containers.port, PING) == 8.0
    assert sample(containers.port, 'headroom_workers{state="alive"}') == 2.0
    gauge = 'headroom_event_loop_utilization_ratio{{worker="{}"}}'
    wait_until(lambda: sample(containers.port, gauge.format(1)) is not None, 60, "the gauges")
    assert sample(containers.port, gauge.format(0)) is not None

    os.kill(processes[0], signal.SIGKILL)
    wait_until(lambda: not first.process.running, 60, "the end of the first app")
    assert sample(containers.port, 'headroom_workers{state="alive"}') == 1.0
    assert sample(containers.port, PING) == 8.0
    assert sample(containers.port, gauge.format(0)) is None
    assert sample(containers.port, gauge.format(1)) is not None

    again = containers.app("again", HEADROOM_GROUP_READABLE="true")
    assert [again.get("/ping") for _ in range(2)] == ['{"pid":1}'] * 2
    assert sample(containers.port, PING) == 10.0
    assert sample(containers.port, 'headroom_workers{state="alive"}') == 2.0
    assert sample(containers.port, "headroom_slots_unreadable") == 0.0
    assert sample(containers.port, "headroom_store_degraded") == 0.0
    assert len(list((containers.volume / "store").glob("slot*.lock"))) == 2
    assert sidecar.running
    assert "Traceback" not in sidecar.tail(1_000)


@pytest.mark.parametrize(
    ("setting", "groups"), [("false", (GROUP,)), ("true", ())], ids=["app-without-the-setting", "sidecar-not-in-group"]
)
def test_a_sidecar_of_another_user_without_the_groups_right_is_refused(
    containers: Containers, setting: str, groups: tuple[int, ...]
) -> None:
    """Status 2 and one line that names the directory and the remedy; the app serves on."""
    app = containers.app("app", HEADROOM_GROUP_READABLE=setting)
    wait_until(lambda: answers(containers.port), 60, "the elected worker")
    sidecar = containers.sidecar(groups=groups)
    assert sidecar.child is not None
    assert sidecar.child.wait(60) == 2
    (line,) = sidecar.tail().splitlines()
    assert f"{containers.seen_by('sidecar')}/sidecar.lock cannot be locked (Permission denied)" in line
    assert "HEADROOM_GROUP_READABLE=true" in line
    assert app.get("/ping") == '{"pid":1}'
    assert sample(containers.port, PING) == 1.0
