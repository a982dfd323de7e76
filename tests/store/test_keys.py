"""Series are found again by their keys, and none of the keys is kept in memory."""

from __future__ import annotations

import dataclasses
import gc
import os
import tracemalloc
from pathlib import Path

import pytest

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store import keys, layout
from fastapi_headroom.store.moving import move
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.region import Region
from fastapi_headroom.store.writer import Writer

USER = Metric("shop_seconds", "histogram", "user", ("route",), "Of the user.", "", (1.0, 2.0))
OTHER_BOUNDS = dataclasses.replace(USER, buckets=(1.0, 4.0))


def renewed(metric: Metric) -> Metric:
    """Return an equal row that no writer knows: its series must be found by their keys."""
    return dataclasses.replace(metric)


def test_a_worker_keeps_no_keys_in_memory() -> None:
    """Ten thousand samples take less than 150 bytes each besides the mapping: a key alone would take twice as much."""
    writer = Writer.in_memory()
    writer.histogram(catalog.REQUEST_DURATION, "GET", "/first", "200", "")
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(625):
            writer.histogram(catalog.REQUEST_DURATION, "GET", f"/route/{number}", "200", "")
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    samples = 625 * (len(catalog.H14) + 2)
    assert len(layout.keys_of(catalog.REQUEST_DURATION, ["GET", "/route/0", "200", ""])[0]) > 200
    assert taken / samples < 150


def test_series_whose_keys_have_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all keys clash, each series has its own values, is found again by an equal row, and after a restart."""
    monkeypatch.setattr(keys, "hash", lambda raw: 7, raising=False)
    rows = (catalog.LOOP_HOLD, catalog.REQUEST_LATENCY)
    for start in (0, 1):
        writer = Writer.open(tmp_path)
        for metric in (*rows, *map(renewed, rows)):
            for number in range(5):
                writer.histogram(metric, f"/{number}").observe(number)
        found = Reader(tmp_path).read().values()
        for metric in rows:
            for number in range(5):
                route = (("http_route", f"/{number}"),)
                assert found[f"{metric.name}_count", route] == 2 + 2 * start
                assert found[f"{metric.name}_sum", route] == (2 + 2 * start) * number
        writer.close()


def test_a_restarted_worker_finds_its_series_and_makes_none_twice(tmp_path: Path) -> None:
    """A worker that takes a slot over counts on in the series that are there: the files do not grow."""
    sizes = set()
    for _ in range(3):
        writer = Writer.open(tmp_path)
        for number in range(50):
            writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()
            writer.histogram(catalog.REQUEST_LATENCY, f"/{number}").observe(0.1)
        regions = writer._files.regions
        sizes.add((regions["counter"].used, regions["histogram"].used))
        assert regions["histogram"].samples == 50 * (len(catalog.H14) + 2) == len(regions["histogram"].entries())
        writer.close()
    assert len(sizes) == 1


def test_a_histogram_whose_buckets_changed_keeps_those_that_are_the_same(tmp_path: Path) -> None:
    """The sum and known buckets go on, new buckets are added once, however often workers with either come."""
    used = []
    for metric in (USER, OTHER_BOUNDS, USER, OTHER_BOUNDS):
        writer = Writer.open(tmp_path)
        for row in (metric, renewed(metric)):
            writer.histogram(row, "/other").observe(0.5)
            writer.histogram(row, "/").observe(1.5)
        used.append(writer._files.regions["histogram"].used)
        assert len({raw for raw, _ in writer._files.regions["histogram"].entries()}) == (
            writer._files.regions["histogram"].samples
        )
        writer.close()
    assert used[0] < used[1] == used[2] == used[3]
    found = Reader(tmp_path).read().values()
    route = ("route", "/")
    assert found["shop_seconds_sum", (route,)] == 12.0
    assert found["shop_seconds_bucket", (("le", "1.0"), route)] == 0
    assert found["shop_seconds_bucket", (("le", "2.0"), route)] == 4
    assert found["shop_seconds_bucket", (("le", "4.0"), route)] == 8


def test_what_has_moved_is_not_found_where_it_was() -> None:
    """A region whose series moved has neither them nor their number, and makes them anew when asked."""
    source, target = Region.anonymous(1 << 20), Region.anonymous(1 << 20)
    series = layout.keys_of(catalog.POOL_WAIT, ["primary"])
    places = source.place(series)
    source.view[places[0]] = 3.0
    move(source, target)
    assert (source.samples, source.entries(), source.has(series[0])) == (0, [], False)
    assert target.samples == len(series)
    assert dict(target.entries())[series[0]] == 3.0
    assert source.place(series) != places
    assert source.samples == len(series) == len(source.entries())
    assert target.place(series) == [index for _, index in target.positions()]


def test_a_gauge_that_is_called_like_a_bucket_is_a_series_of_its_own() -> None:
    """Series that nobody writes to are moved one by one, whatever their names end in, and found there."""
    source, target = Region.anonymous(1 << 20), Region.anonymous(1 << 20)
    rows = [Metric(name, "gauge", "user", (), "One.") for name in ("lag_sum", "token_bucket", "lag_count")]
    for number, row in enumerate(rows):
        source.view[source.place(layout.keys_of(row, []))[0]] = float(number)
    move(source, target)
    for number, row in enumerate(rows):
        raw = layout.keys_of(row, [])[0]
        assert target.has(raw)
        assert target.view[target.place([raw])[0]] == number


def test_a_forked_child_maps_none_of_its_parents_files(tmp_path: Path) -> None:
    """What a child writes through inherited handles goes to memory of its own, in which nobody looks for series."""
    writer = Writer.open(tmp_path)
    handle = writer.counter(catalog.PROBE_ERRORS, "request")
    writer.histogram(catalog.POOL_WAIT, "primary").observe(0.1)
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            handle.inc()
            writer.counter(catalog.PROBE_ERRORS, "cache").inc()
            mapped = str(tmp_path) in Path("/proc/self/maps").read_text()
            os.write(done, repr((mapped, sum(writer.samples().values()))).encode())
        finally:
            os._exit(0)
    os.close(done)
    assert os.read(ready, 1_000) == b"(False, 1.0)"
    os.waitpid(child, 0)
    writer.close()
