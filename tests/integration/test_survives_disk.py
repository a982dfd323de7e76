"""Real servers on disks that are full, read-only, deleted or full of rubbish: the app serves, the sidecar tells."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.stack.process import accepts, free_port, wait_until
from fastapi_headroom import catalog
from fastapi_headroom.store import layout
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.support.scrape import Scrape, scrape, scrape_until
from tests.support.serving import Serving, serve
from tests.support.survival import APP, OK, Clients, Disk, counted, disk, scrape_timed, sidecar

pytestmark = pytest.mark.alone

PAGES = 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system that holds a worker's first files and little more."""
    with disk(tmp_path, "448k") as made:
        yield made


def visit_pages(server: Serving) -> None:
    """Ask for every page: each route brings some thirty kilobytes of series."""
    for number in range(PAGES):
        server.get(f"/pages/{number}")


def pages(seen: Scrape) -> float:
    """Return how many requests for pages were scraped."""
    return sum(
        value for name, labels, value in seen.samples if name == OK and labels["http_route"].startswith("/pages/")
    )


def timed_pages(store: Path) -> dict[str, float]:
    """Return how many requests for each page the histograms in the files hold."""
    samples = Reader(store).read().values().items()
    name = "http_server_request_duration_seconds_count"
    routes = ((dict(labels)["http_route"], value) for (sample, labels), value in samples if sample == name)
    return {route: value for route, value in routes if route.startswith("/pages/")}


def test_a_disk_that_runs_full_under_load_costs_nothing(small_disk: Disk) -> None:
    """The worker lives and answers, its own /metrics has every count, and when there is room so have the files."""
    store, port = small_disk.path / "store", free_port()
    metrics = f"http://127.0.0.1:{port}"
    with serve("uvicorn", APP, env={"HEADROOM_DIRECTORY": str(store), "HEADROOM_PORT": str(port)}) as server:
        pid = json.loads(server.get("/ping"))["pid"]
        with Clients(server.port, number=2, pause=0.005) as clients:
            visit_pages(server)
            visit_pages(server)
            seen = scrape_until(metrics, lambda s: s.total("headroom_store_degraded") == 1)
            assert pages(seen) == 2 * PAGES
            assert len(seen.values("http_server_request_duration_seconds_count", "http_route")) > PAGES
            with contextlib.suppress(OSError), (small_disk.path / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(4096))
            visit_pages(server)
        assert set(clients.statuses) == {200}
        assert clients.answered == clients.asked > 20
        assert json.loads(server.get("/ping"))["pid"] == pid
        assert server.log().count("No space left") == 1
        assert len(timed_pages(store)) < PAGES
        small_disk.remount("size=32m")
        seen = scrape_until(metrics, lambda s: s.total("headroom_store_degraded") == 0)
        assert pages(seen) == 3 * PAGES
        assert timed_pages(store) == dict.fromkeys(timed_pages(store), 3.0)
        assert len(timed_pages(store)) == PAGES
        with sidecar(store) as url:
            assert pages(scrape(url)) == 3 * PAGES
            assert scrape(url).total(OK, http_route="/ping") == clients.answered + 2


def test_a_sidecar_on_a_full_disk_says_so(small_disk: Disk) -> None:
    """It answers within 100 ms with what is in the files, and headroom_store_degraded is 1."""
    store = small_disk.path / "store"
    with sidecar(store) as url, serve("uvicorn", APP, env={"HEADROOM_DIRECTORY": str(store)}) as server:
        visit_pages(server)
        server.get("/ping")
        scrape_until(url, lambda s: s.total("headroom_store_degraded") == 1)
        seen, seconds = scrape_timed(url)
        assert 0 < pages(seen) <= PAGES
        assert seen.total("headroom_workers", state="alive") == 1
        assert seconds < 0.1


def test_a_read_only_directory_is_used_once_it_may_be_written(tmp_path: Path) -> None:
    """The app serves all the while; with the right to write come the files, with what was counted before."""
    with disk(tmp_path, "8m") as made:
        store = made.path / "store"
        store.mkdir(mode=0o700)
        made.remount("ro")
        with serve("uvicorn", APP, env={"HEADROOM_DIRECTORY": str(store)}) as server:
            for _ in range(30):
                server.get("/ping")
            assert server.log().count("cannot be written by user id") == 1
            assert list(store.iterdir()) == []
            made.remount("rw")
            wait_until(lambda: counted(store) == 30, 10, "the counts in the files")
            server.get("/ping")
            with sidecar(store) as url:
                seen = scrape(url)
                assert seen.total(OK, http_route="/ping") == 31
                assert seen.total("headroom_store_degraded") == 0
                assert seen.total("headroom_workers", state="alive") == 1


def test_where_no_directory_can_be_used_a_worker_exports_what_it_has(tmp_path: Path) -> None:
    """On a read-only disk without a sidecar /metrics shows one worker and that it is degraded; later it shows all."""
    port = free_port()
    metrics = f"http://127.0.0.1:{port}"
    with disk(tmp_path, "8m") as made:
        store = made.path / "store"
        store.mkdir(mode=0o700)
        made.remount("ro")
        env = {"HEADROOM_DIRECTORY": str(store), "HEADROOM_PORT": str(port)}
        with serve("gunicorn", APP, workers=2, env=env) as server:
            for _ in range(30):
                server.get("/ping")
            seen = scrape_until(metrics, lambda s: s.total("headroom_store_degraded") == 1)
            assert seen.total("headroom_workers", state="alive") == 0
            made.remount("rw")
            seen = scrape_until(metrics, lambda s: s.total("headroom_workers", state="alive") == 2)
            seen = scrape_until(metrics, lambda s: s.total(OK, http_route="/ping") == 30)
            assert seen.total("headroom_store_degraded") == 0


def test_a_directory_deleted_under_running_workers_comes_back_with_their_counts() -> None:
    """Two workers make it again in their slots, and after it every answer since the start is counted once."""
    with serve("gunicorn", APP, workers=2) as server, sidecar(server.directory) as url:
        with Clients(server.port, pause=0.002) as clients:
            # Both have their slots: a worker that starts in the new directory would take that of one that waits.
            scrape_until(url, lambda s: s.total("headroom_workers", state="alive") == 2, 30)
            scrape_until(url, lambda s: s.total(OK, http_route="/ping") > 200)
            gone = server.directory.rename(server.directory.with_name("gone"))  # at once: they may make it again
            shutil.rmtree(gone)
            answered = clients.answered  # both may still be there at first: what came since is what counts
            scrape_until(url, lambda s: s.total(OK, http_route="/ping") > answered + 200)
            scrape_until(url, lambda s: s.total("headroom_workers", state="alive") == 2)
        assert set(clients.statuses) == {200}
        assert scrape(url).total(OK, http_route="/ping") == clients.answered
        assert scrape(url).values("headroom_worker_requests_total", "worker") == {"0", "1"}
        assert sorted(path.name for path in server.directory.glob("slot*.lock")) == ["slot0.lock", "slot1.lock"]


def test_rubbish_in_the_directory_is_counted_and_nothing_else_changes() -> None:
    """Corrupted, truncated and foreign files are named and counted; the rest is scraped within 100 ms."""
    with serve("uvicorn", APP) as server, sidecar(server.directory) as url:
        for _ in range(5):
            server.get("/ping")
        store = server.directory
        (store / "counter_901.db").write_bytes(os.urandom(4096))
        (store / "notes.db").write_text("mine")
        (store / "readme.txt").write_text("mine")
        (store / "histogram_902.db").write_bytes((store / "histogram_slot0.db").read_bytes()[:3_000])
        (store / "gauge_livesum_903.db").mkdir()
        os.mkfifo(store / "counter_904.db")
        os.truncate(store / "histogram_902.db", 5)
        seen, seconds = scrape_timed(url)
        assert seen.total("headroom_slots_unreadable") == 5
        assert seen.total(OK, http_route="/ping") == 5
        assert seen.total("headroom_store_degraded") == 0
        assert seconds < 0.1
        server.get("/ping")
        assert scrape(url).total(OK, http_route="/ping") == 6


def test_a_damaged_slot_and_one_of_another_release_are_taken_over(tmp_path: Path) -> None:
    """A slot with other help texts goes on with its counts, one that was truncated starts anew; both serve."""
    store = tmp_path / "store"
    for number in range(2):
        writers = [Writer.open(store) for _ in range(number + 1)]
        writers[-1].counter(catalog.REQUESTS, "/ping", "ok").inc(100)
        for writer in writers:
            writer.close()
    # slot 0 of another release: its record says so, and its help texts are others
    raw = layout.key("headroom_requests", OK, {"http_route": "/ping", "outcome": "ok"}, "As it was said once.")
    content = layout.entry(raw, 1_000.0)
    (store / "counter_slot0.db").write_bytes(layout.used_header(8 + len(content)) + bytes(4) + content)
    (store / "slot0.lock").write_text('{"fingerprint": "another release"}')
    os.truncate(store / "counter_slot1.db", 60)
    with (
        sidecar(store) as url,
        serve("gunicorn", APP, workers=2, env={"HEADROOM_DIRECTORY": str(store)}) as server,
    ):
        scrape_until(url, lambda s: s.total("headroom_workers", state="alive") == 2)
        wait_until(lambda: accepts(server.port), 10, "the server")
        for _ in range(10):
            server.get("/ping")
        seen = scrape(url)
        assert seen.total(OK, http_route="/ping") == 1_010
        assert "As it was said once." not in seen.text
        assert seen.total("headroom_slots_unreadable") == 0
        assert seen.total("headroom_store_degraded") == 0
        assert (store / "counter_slot1.db.torn").exists()
