"""The whole demo: it starts, tells what is wrong, and leaves no process behind, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from demo_app.__main__ import main
from demo_app.stack import config, packages
from demo_app.stack.grafana import Grafana, find_grafana
from demo_app.stack.packages import PackagesMissingError, ensure_packages
from demo_app.stack.process import Process, ProcessError, wait_until
from demo_app.stack.servers import TEST_PACKAGES, MissingBinaryError
from demo_app.stack.stack import Stack

pytestmark = pytest.mark.timeout(600)  # a dozen servers start, on a machine that may be busy

ROOT = Path(__file__).parents[2]


@dataclass
class Demo:
    """A demo that runs in a folder of its own. Its processes carry a mark in their environment."""

    home: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen: set[psutil.Process] = field(default_factory=set)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "demo_app", "demo", "--home", str(self.home)]
        environment = {**os.environ, "DEMO_MARK": self.mark}
        environment.pop("GRAFANA_HOME", None)
        self.log = self.home.with_suffix(".log")
        with self.log.open("wb") as log:
            self.runner = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, text: str, seconds: float = 150.0) -> None:
        """Wait until the demo has printed a text."""
        wait_until(lambda: text in self.printed() or self.runner.poll() is not None, seconds, text)
        assert text in self.printed(), self.printed()

    def printed(self) -> str:
        """Return what was printed so far."""
        return self.log.read_text()

    def parts(self) -> list[psutil.Process]:
        """Return all processes below the demo, and remember them."""
        self.seen |= set(psutil.Process(self.runner.pid).children(recursive=True))
        return [process for process in self.seen if process.is_running()]

    def left(self) -> list[str]:
        """Return what still runs: processes seen before, and any that carry the mark."""
        found = []
        for process in {*self.seen, *psutil.process_iter()}:
            try:
                marked = process.environ().get("DEMO_MARK") == self.mark
                if (marked or process in self.seen) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Demo]]:
    """Start a demo; whatever is left of it at the end is killed."""
    started: list[Demo] = []

    def starter() -> Demo:
        started.append(Demo(tmp_path / "demo"))
        return started[-1]

    yield starter
    for demo in started:
        for line in demo.left():
            os.kill(int(line.split()[0]), signal.SIGKILL)
        demo.runner.wait()


def test_a_fault_stops_its_part_and_healing_starts_it_again(tmp_path: Path) -> None:
    """While ``database_down`` is on its part does not run and nobody takes that for a failure; then it runs again."""
    stack = Stack(tmp_path, scale=1.0, say=lambda _: None)
    part = Process("postgres", ["sleep", "60"], log=tmp_path / "log")
    stack.parts.append(part)
    part.start()
    try:
        stack.switches.set("database_down", True)
        stack.check()
        assert not part.running
        stack.check()
        stack.switches.set("database_down", False)
        stack.check()
        assert part.running
        os.kill(part.pid, signal.SIGKILL)
        wait_until(lambda: not part.running, 60, "the end")
        with pytest.raises(ProcessError, match="postgres has ended"):
            stack.check()
    finally:
        stack.stop()


def test_ctrl_c_ends_all_parts(start: Callable[[], Demo]) -> None:
    """The demo shows its addresses and measures itself; Ctrl-C ends every part within seconds, with status 0."""
    demo = start()
    demo.wait_for("Ctrl-C ends it all")
    words = " ".join(word for process in demo.parts() for word in process.cmdline())
    for part in ("postgres", "redis-server", "uvicorn", "celery", "sidecar", "prometheus", "alertmanager", "locust"):
        assert part in words, part
    for name in ("Inbox", "Prometheus", "Alertmanager", "Sidecar", "Shop"):
        assert re.search(rf"^  {name} +http://127\.0\.0\.1:\d+/", demo.printed(), re.MULTILINE), name
    assert "GRAFANA_HOME" in demo.printed()
    demo.runner.send_signal(signal.SIGINT)
    assert demo.runner.wait(120) == 0
    assert demo.left() == []


def test_a_part_that_dies_ends_the_demo(start: Callable[[], Demo]) -> None:
    """When Redis is killed the demo names it, ends all other parts and fails."""
    demo = start()
    demo.wait_for("load by locust")
    redis = next(it for it in demo.parts() if it.name() == "redis-server" and it.cwd().endswith("data/redis"))
    redis.kill()
    assert demo.runner.wait(120) == 1
    assert "redis has ended (status -9)" in demo.printed()
    assert demo.left() == []


def test_a_killed_demo_leaves_nothing(start: Callable[[], Demo]) -> None:
    """Even kill -9 of the demo itself takes all parts along."""
    demo = start()
    demo.wait_for("load by locust")
    assert len(demo.parts()) > 10
    demo.runner.kill()
    demo.runner.wait()
    wait_until(lambda: not demo.left(), 60, "no process left")


CLINGING = """
import os, socket, sys, time
if os.fork() == 0:
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    memory = bytearray(100_000_000)  # to give it back takes time, before files are closed
    memory[::4096] = b"x" * len(memory[::4096])
    connection.sendall(b"x")
time.sleep(600)
"""


def test_a_stopped_process_leaves_no_connection_of_its_children(tmp_path: Path) -> None:
    """When ``stop`` returns, the connections of all processes of the group are closed: no broker gives them a job."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", CLINGING, str(server.getsockname()[1])]
        for attempt in range(3):
            parent = Process("parent", command, log=tmp_path / f"{attempt}.log", grace=0.05)
            parent.start()
            connection, _ = server.accept()
            with connection:
                assert connection.recv(1) == b"x"
                parent.stop()
                connection.setblocking(False)
                assert connection.recv(1) == b""


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two demos would overwrite each other's data: the second one says so and fails."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["demo", "--home", str(tmp_path)]) == 1
    assert f"a demo runs in {tmp_path} already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--fault", "nope"], ["fault", "nope", "on"], ["demo", "--scale", "0"], ["demo", "--duration", "-1"]],
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown fault names those that there are; numbers below 0 are refused; nothing is started."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "loop_block" in said or "above 0" in said


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not install packages is told in one line what to run."""

    def find(binary: str) -> Path:
        if binary == "redis-server":
            raise MissingBinaryError(binary)
        return Path("/usr/bin") / binary

    monkeypatch.setattr(packages, "find", find)
    monkeypatch.setattr(packages, "_become_root", lambda: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(
        PackagesMissingError, match=r"^redis-server not installed.*run: sudo apt-get install redis-server$"
    ):
        ensure_packages(lambda _: None)


def test_only_the_tests_need_some_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the demo misses nothing; the tests name their packages."""

    def find(binary: str) -> Path:
        if binary in TEST_PACKAGES:
            raise MissingBinaryError(binary)
        return Path("/usr/bin") / binary

    monkeypatch.setattr(packages, "find", find)
    assert packages.missing_packages() == []
    assert packages.missing_packages(TEST_PACKAGES) == ["rabbitmq-server", "mariadb-server-core", "memcached"]


def test_alertmanager_hurries_and_tells_only_the_inbox(tmp_path: Path) -> None:
    """Every route waits for seconds, every receiver is the inbox, inhibition stays as shipped."""
    shipped = ROOT / "alerts" / "alertmanager.yml"
    path = config.write_alertmanager(tmp_path / "a.yml", shipped=shipped, inbox="http://127.0.0.1:1/")
    written, before = yaml.safe_load(path.read_text()), yaml.safe_load(shipped.read_text())
    routes = [written["route"], *written["route"]["routes"]]
    assert {(route["group_wait"], route["group_interval"]) for route in routes} == {("1s", "5s")}
    assert {hook["url"] for it in written["receivers"] for hook in it["webhook_configs"]} == {"http://127.0.0.1:1/"}
    assert written["inhibit_rules"] == before["inhibit_rules"]
    assert [it["name"] for it in written["receivers"]] == [it["name"] for it in before["receivers"]]


def test_grafana_is_found_and_provisioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRAFANA_HOME is started on the loopback address, for viewers, with the data source and the boards."""
    home = tmp_path / "grafana-home"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "grafana"
    script.write_text(
        f"#!{sys.executable}\n"
        "import http.server, json, os, sys\n"
        "grafana = {key: it for key, it in os.environ.items() if key.startswith('GF_')}\n"
        "print(json.dumps([sys.argv[1:], grafana]), flush=True)\n"
        "address = os.environ['GF_SERVER_HTTP_ADDR'], int(os.environ['GF_SERVER_HTTP_PORT'])\n"
        "http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("GRAFANA_HOME", str(home))
    found = find_grafana()
    assert found == ([str(script), "server"], home)
    boards = tmp_path / "boards"
    provisioning = config.write_grafana_provisioning(
        tmp_path / "provisioning", prometheus="http://127.0.0.1:9", dashboards=boards
    )
    log = tmp_path / "grafana.log"
    first = boards / "headroom-overview.json"
    with Grafana(*found, data=tmp_path / "data", provisioning=provisioning, first_board=first, log=log):
        arguments, settings = json.loads(log.read_text().splitlines()[0])
    assert arguments == ["server", "--homepath", str(home)]
    assert settings["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH" not in settings  # that board does not exist
    folder = Path(settings["GF_PATHS_PROVISIONING"])
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards/headroom.yaml").read_text())["providers"]
    assert (source["url"], provider["options"]["path"]) == ("http://127.0.0.1:9", str(boards))
