"""A kept directory with a new release: no gauge is doubled and no buckets mix, by our reader and by the peer's."""

from __future__ import annotations

import dataclasses
import time
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer

NEW = {
    "POOL_WAIT": dataclasses.replace(catalog.POOL_WAIT, buckets=(0.02, 0.3, 7.0)),
    "POOL_USE": dataclasses.replace(catalog.POOL_USE, help="Said better."),
    "PROBE_ERRORS": dataclasses.replace(catalog.PROBE_ERRORS, help="Said better."),
    "QUEUE_DEPTH": dataclasses.replace(catalog.QUEUE_DEPTH, help="Said better."),
}
"""Rows of the next release: other buckets, and other help texts of a histogram, a counter and a gauge."""
DEPTH_LABELS = (("messaging_destination_name", "mail"), ("messaging_system", "redis"), ("priority", "0"))


def release(monkeypatch: pytest.MonkeyPatch, rows: dict[str, Metric]) -> None:
    """Let the catalog be that of another release."""
    changed = {row.name: row for row in rows.values()}
    monkeypatch.setattr(catalog, "ALL", [changed.get(metric.name, metric) for metric in catalog.ALL])
    for field, row in rows.items():
        monkeypatch.setattr(catalog, field, row)


def write(writer: Writer) -> None:
    """Count once everywhere."""
    writer.histogram(catalog.POOL_WAIT, "primary").observe(0.25)
    writer.histogram(catalog.POOL_USE, "primary").observe(0.25)
    writer.counter(catalog.PROBE_ERRORS, "request").inc()
    writer.gauge(catalog.QUEUE_DEPTH, "redis", "mail", "0").set(5)


def both(directory: Path, reader: Reader) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return what a reader and prometheus_client's own collector agree on."""
    values = reader.read().values()
    assert values == {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in MultiProcessCollector(None, str(directory)).collect()
        for sample in family.samples
    }
    return values


@pytest.mark.parametrize("workers", [1, 3])
def test_a_new_release_neither_doubles_gauges_nor_mixes_buckets(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers of the old release end, as many or fewer of the new one start: texts that changed cost nothing,
    buckets that changed start anew, and what the slots left over had is counted under the new keys."""
    old = [Writer.open(tmp_path) for _ in range(3)]
    for writer in old:
        write(writer)
    reader = Reader(tmp_path)
    assert both(tmp_path, reader)["headroom_queue_depth", DEPTH_LABELS] in (5, 15)
    for writer in old[:2]:
        writer.close()
    assert old[2]._files.slot is not None
    old[2]._files.slot.release()  # killed: its gauges stay behind
    old[2]._files.leave(copy=False)
    release(monkeypatch, NEW)
    new = [Writer.open(tmp_path) for _ in range(workers)]
    for writer in new:
        write(writer)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    for writer in new:
        writer.tend()
    values = both(tmp_path, reader)
    single = 5 if catalog.QUEUE_DEPTH.mode == "livemax" else 5 * workers
    assert values["headroom_queue_depth", DEPTH_LABELS] == single
    assert values["headroom_probe_errors_total", (("probe", "request"),)] == 3 + workers
    pool = ("db_client_connection_pool_name", "primary")
    assert values[f"{catalog.POOL_USE.name}_count", (pool,)] == 3 + workers
    assert values[f"{catalog.POOL_WAIT.name}_count", (pool,)] == workers
    bounds = [dict(labels)["le"] for name, labels in values if name == f"{catalog.POOL_WAIT.name}_bucket"]
    assert sorted(bounds, key=float) == ["0.02", "0.3", "7.0", "+Inf"]
    buckets = [value for (name, _), value in values.items() if name == f"{catalog.POOL_USE.name}_bucket"]
    assert all(lower <= upper for lower, upper in pairwise(buckets))
    texts = {family.name: family.help for family in reader.read().families}
    assert texts["headroom_queue_depth"] == texts["headroom_probe_errors"] == "Said better."
    for writer in new:
        writer.close()


def test_slots_of_living_workers_of_another_release_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a rolling update the old workers count on in their files."""
    old = Writer.open(tmp_path)
    write(old)
    release(monkeypatch, NEW)
    new = Writer.open(tmp_path)
    write(new)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    new.tend()
    old.counter(catalog.REQUESTS, "/ping", "ok").inc()
    values = Reader(tmp_path).read().values()
    assert values["headroom_probe_errors_total", (("probe", "request"),)] == 2
    assert values["headroom_requests_total", (("http_route", "/ping"), ("outcome", "ok"))] == 1
    old.close()
    new.close()
