"""The sidecar as a process, over a store that other processes write."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from demo_app.stack.process import free_port
from demo_app.stack.servers import Redis
from fastapi_headroom import catalog, settings
from fastapi_headroom.exporter import elsewhere
from fastapi_headroom.exporter import sidecar as exporter_sidecar
from fastapi_headroom.exporter.election import Election
from fastapi_headroom.exporter.locks import EXPORTER_LOCK, SIDECAR_LOCK, is_held, provide
from fastapi_headroom.store.writer import Writer
from tests.exporter.support import (
    Child,
    answers,
    candidate,
    eventually,
    get,
    half_open,
    serving_sidecar,
    sidecar,
    worker,
)

COUNTED = 'headroom_requests_total{http_route="/orders/{id}",outcome="ok"}'


def sample(port: int, series: str) -> float | None:
    """Return the value of one series of a scrape, None when it is not there."""
    lines = (line.rpartition(" ") for line in get(port).text.splitlines())
    return next((float(value) for name, _, value in lines if name == series), None)


def test_it_merges_what_other_processes_write(tmp_path: Path) -> None:
    """Two workers' counters are one sum, and both are alive; OpenMetrics says the same."""
    port = free_port()
    with worker(tmp_path / "store"), worker(tmp_path / "store"), serving_sidecar(tmp_path / "store", port) as child:
        assert sample(port, COUNTED) == 6.0
        assert sample(port, 'headroom_workers{state="alive"}') == 2.0
        body = get(port, Accept="application/openmetrics-text").text
        values = {s.name: s.value for family in parse_openmetrics(body) for s in family.samples if "route" in str(s)}
        assert values["headroom_requests_total"] == 6.0
        assert f"metrics at http://127.0.0.1:{port}/metrics from {tmp_path / 'store'}" in child.log()


def test_it_answers_while_the_workers_stand_still(tmp_path: Path) -> None:
    """With every worker stopped by SIGSTOP a scrape answers within 100 ms with all they have counted."""
    port = free_port()
    with worker(tmp_path) as stopped, serving_sidecar(tmp_path, port):
        os.kill(stopped.pid, signal.SIGSTOP)
        took = []
        for _ in range(5):
            began = time.monotonic()
            assert sample(port, COUNTED) == 3.0
            took.append(time.monotonic() - began)
        assert min(took) < 0.1, took
        os.kill(stopped.pid, signal.SIGCONT)


def test_what_dead_workers_counted_stays(tmp_path: Path) -> None:
    """After kill -9 the counters are there, the gauges are not, and nobody is alive."""
    port = free_port()
    with serving_sidecar(tmp_path, port):
        with worker(tmp_path):
            assert sample(port, 'headroom_event_loop_utilization_ratio{worker="0"}') == 0.25
        assert sample(port, COUNTED) == 3.0
        assert sample(port, 'headroom_workers{state="alive"}') == 0.0
        assert sample(port, 'headroom_event_loop_utilization_ratio{worker="0"}') is None


def test_it_starts_before_the_first_worker_and_survives_the_directory(tmp_path: Path) -> None:
    """It makes the directory, keeps answering when somebody deletes it, and serves it again when it comes back."""
    port, store = free_port(), tmp_path / "run" / "store"
    with serving_sidecar(store, port):
        assert store.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(store)
        assert sample(port, 'headroom_workers{state="alive"}') == 0.0
        assert get(port, "/healthz").json["directory_present"] is False
        with worker(store):
            assert sample(port, COUNTED) == 3.0
            eventually(lambda: is_held(store / SIDECAR_LOCK), "the new lock")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it with status 0, without a trace, and the lock is free."""
    with serving_sidecar(tmp_path, free_port()) as child:
        child.process.send_signal(number)
        assert child.wait() == 0
        assert "Traceback" not in child.log()
    assert not is_held(tmp_path / SIDECAR_LOCK)


def test_a_second_sidecar_is_refused(tmp_path: Path) -> None:
    """One store has one sidecar; the second one names the directory and the remedy and ends with status 2."""
    with serving_sidecar(tmp_path, free_port()), sidecar("--dir", str(tmp_path), "--port", "0") as second:
        assert second.wait() == 2
        (line,) = second.log().splitlines()
        assert f"another sidecar serves {tmp_path}" in line
        assert "--dir or HEADROOM_DIRECTORY" in line


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    """A port that something else listens on is named with the remedy, status 2, and the lock is free again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with sidecar("--dir", str(tmp_path), "--port", str(port)) as child:
            assert child.wait() == 2
            (line,) = child.log().splitlines()
    assert f"port 127.0.0.1:{port} is in use" in line
    assert "--port" in line
    assert not is_held(tmp_path / SIDECAR_LOCK)


@pytest.fixture
def other_service() -> Iterator[Path]:
    """The default store of a service of this user, whose name nobody else has."""
    with tempfile.TemporaryDirectory(
        prefix=f"headroom-{os.getuid()}-", dir=settings.load({}).store_directory.parent
    ) as at:
        yield Path(at)


def test_a_port_that_another_store_of_the_user_exports_on_says_which(
    tmp_path: Path, other_service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar with another service name than the app's finds its port taken, and is told the app's store."""
    port = free_port()
    with candidate(other_service, port):
        eventually(lambda: answers(port), "the election")
        with sidecar("--dir", str(tmp_path), "--port", str(port)) as child:
            assert child.wait() == 2
            (line,) = child.log().splitlines()
        assert f"port 127.0.0.1:{port} is in use" in line
        assert "Workers of " in line and "HEADROOM_SERVICE_NAME (--service)" in line
        assert other_service in settings.default_stores()  # among the latest three it may not be, where many run
        monkeypatch.setattr(settings, "default_stores", lambda: [other_service])
        assert f"Workers of {other_service} export" in elsewhere.exporting(tmp_path)
        assert elsewhere.exporting(other_service) == ""


def test_a_sidecar_without_workers_says_where_there_are_some(
    tmp_path: Path, other_service: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once, some seconds after its start, and says nothing when a worker has come."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(exporter_sidecar, "_LONELY_SECONDS", 0.0)
    monkeypatch.setattr(settings, "default_stores", lambda: [other_service])
    with worker(other_service):
        lonely = exporter_sidecar.Sidecar(settings.load({}, directory=tmp_path, port=0))
        lonely.tend()
        lonely.tend()
        lonely.stop()
        (record,) = caplog.records
        assert f"no worker writes to {tmp_path}" in record.getMessage()
        assert f"--dir {other_service}" in record.getMessage()
        caplog.clear()
        served = exporter_sidecar.Sidecar(settings.load({}, directory=other_service, port=0))
        served.tend()
        served.stop()
        assert not caplog.records
    alone = exporter_sidecar.Sidecar(settings.load({}, directory=tmp_path, port=0))
    alone.tend()
    alone.stop()
    assert "start the app, with the same HEADROOM_SERVICE_NAME" in caplog.text


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_directory_that_cannot_be_is_one_line(tmp_path: Path, inside: str) -> None:
    """A file where the directory should be, or above it, is named with the remedy, status 2."""
    path = tmp_path / "file"
    path.write_text("")
    with sidecar("--dir", str(path / inside), "--port", "0") as child:
        assert child.wait() == 2
        (line,) = child.log().splitlines()
    assert str(path) in line
    assert "HEADROOM_DIRECTORY" in line


STRANGER = """
import encodings.idna, os, sys, time  # what is imported later may not be readable any more
from pathlib import Path
from fastapi_headroom import settings
from fastapi_headroom.errors import StoreError
from fastapi_headroom.exporter.sidecar import Sidecar
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    sidecar = Sidecar(settings.load({}, directory=Path(sys.argv[1]), port=int(sys.argv[2])))
except StoreError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print("ready", flush=True)
time.sleep(60)
"""
TENDED = """
while True:
    sidecar.tend()
    print("tended", flush=True)
    time.sleep(0.1)
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def visible() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="headroom-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@as_root
def test_a_directory_of_somebody_else_is_one_line(visible: Path) -> None:
    """A directory that the sidecar's user may not write is named with the remedy."""
    with Child(["-c", STRANGER, str(visible), "0"], ready=False) as child:
        assert child.wait() == 2, child.log()
        (line,) = child.log().splitlines()
    assert f"{visible / SIDECAR_LOCK} cannot be locked (Permission denied)" in line
    assert "HEADROOM_GROUP_READABLE=true" in line


@as_root
def test_a_sidecar_of_another_user_needs_the_groups_right_only(visible: Path) -> None:
    """With the group setting a sidecar in the directory's group takes over though it can write nothing there."""
    store, port = visible / "store", free_port()
    os.chown(visible, 0, 65534)
    visible.chmod(0o2755)  # as a volume with a group of its own is
    writer = Writer.open(store, group_readable=True)
    election = Election(settings.load({}, directory=store, port=port, group_readable=True))
    election.start()
    eventually(lambda: election.url is not None, "the election")
    writer.counter(catalog.REQUESTS, "/orders/{id}", "ok").inc(3)
    latency = writer.histogram(catalog.REQUEST_LATENCY, "/orders/{id}")
    latency.observe(0.2)
    writer.exemplar(latency, 0.2, 6, 7)
    with Child(["-c", STRANGER, str(store), str(port)]):
        assert election.url is None
        assert is_held(store / SIDECAR_LOCK)
        assert sample(port, COUNTED) == 3.0
        assert 'span_id="0000000000000007"' in get(port, Accept="application/openmetrics-text").text
    assert store.stat().st_mode & 0o7777 == 0o2750
    election.stop()
    writer.close()


@as_root
def test_a_sidecar_outlives_the_right_to_see_its_directory(visible: Path) -> None:
    """When the directory is closed to the sidecar's user it serves what it has open, and goes on when it may again."""
    store, port = visible / "inner" / "store", free_port()
    (visible / "inner").mkdir()
    os.chown(visible / "inner", 0, 65534)
    (visible / "inner").chmod(0o2755)
    writer = Writer.open(store, group_readable=True)
    provide(store / SIDECAR_LOCK, mode=0o640)
    with Child(["-c", STRANGER.replace("time.sleep(60)", TENDED), str(store), str(port)]) as child:
        (visible / "inner").chmod(0o700)
        assert get(port, "/healthz").json["directory_present"] is False
        assert get(port).status == 200
        assert child.process.stdout is not None
        for _ in range(2):
            assert child.process.stdout.readline() == "tended\n", child.log()
        (visible / "inner").chmod(0o2755)
        assert get(port, "/healthz").json["directory_present"] is True
        assert child.process.poll() is None
    writer.close()


def test_variables_are_the_defaults(tmp_path: Path) -> None:
    """Without options the sidecar does what HEADROOM_* variables say."""
    port = free_port()
    variables = {
        "HEADROOM_DIRECTORY": str(tmp_path / "store"),
        "HEADROOM_PORT": str(port),
        "HEADROOM_EXPECTED_WORKERS": "4",
    }
    with sidecar(env=variables):
        eventually(lambda: is_held(tmp_path / "store" / SIDECAR_LOCK), "the lock")
        eventually(lambda: _sample_or_none(port, 'headroom_workers{state="expected"}') == 4.0, "the scrape")


def test_it_polls_the_queues_that_it_is_given(tmp_path: Path) -> None:
    """Depth is there while no app runs at all, and nothing of the workers' is made up."""
    import redis

    port = free_port()
    with Redis(tmp_path / "redis") as broker, redis.Redis(port=broker.port) as client:
        client.lpush("mail", "{}", "{}")
        url = f"celery+redis://127.0.0.1:{broker.port}/0?queues=mail"
        with serving_sidecar(tmp_path / "store", port, "--queue", url):
            labels = 'messaging_destination_name="mail",messaging_system="redis",priority="0"'
            eventually(lambda: sample(port, f"headroom_queue_depth{{{labels}}}") == 2.0, "the depth")
            assert sample(port, 'headroom_probe_up{probe="queue"}') == 1.0
            assert sample(port, 'headroom_remaining_ratio{name="mail",resource="queue"}') is not None
            assert "http_server" not in get(port).text
    assert not (tmp_path / "store" / EXPORTER_LOCK).exists()


def test_bad_company_all_at_once_costs_a_sidecar_little(tmp_path: Path) -> None:
    """Silent, huge, endless and broken requests by the hundred, and 200 scrapes: all answered, in bounded memory."""
    port = free_port()
    with worker(tmp_path), serving_sidecar(tmp_path, port) as child:
        sample(port, COUNTED)
        before = _memory(child.pid)
        bad = (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\n" + b"X-A: b\r\n" * 10_000, b"GET /" + b"a" * 1_000_000)
        company = []
        for number in range(200):
            connection = half_open(port)
            company.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(bad[number % len(bad)])
        with ThreadPoolExecutor(50) as pool:
            assert list(pool.map(lambda _: sample(port, COUNTED), range(200))) == [3.0] * 200
        for connection in company:
            connection.close()
        assert _memory(child.pid) - before < 32 << 20
        assert "Traceback" not in child.log()


def _memory(pid: int) -> int:
    """Return a process' resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def _sample_or_none(port: int, series: str) -> float | None:
    try:
        return sample(port, series)
    except OSError:
        return None
