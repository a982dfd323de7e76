"""Exemplars: small files beside the series, one example per bucket, over several workers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from fastapi_headroom import catalog
from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.exposition import Renderer
from fastapi_headroom.exporter.scrape import Scraper
from fastapi_headroom.store import exemplars
from fastapi_headroom.store.exemplars import ExemplarReader, Exemplars, file_name
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer

METRIC = catalog.REQUEST_LATENCY
BUCKET = f"{METRIC.name}_bucket"


def observe(writer: Writer, route: str, value: float, trace_id: int) -> None:
    histogram = writer.histogram(METRIC, route)
    histogram.observe(value)
    writer.exemplar(histogram, value, trace_id, 1)


def traces(found: Exemplars) -> dict[tuple[str, str], int]:
    """Return trace ids by route and bound."""
    return {
        (labels[0][1], labels[1][1]): int(exemplar.trace_id, 16)
        for (_, labels), exemplar in found.get(METRIC.name, {}).items()
    }


@pytest.fixture(autouse=True)
def _no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exemplars, "INTERVAL", 0.0)


def test_the_latest_example_of_each_bucket_over_all_workers(tmp_path: Path) -> None:
    """Two workers' examples are merged by bucket, the later one wins, and values and times are kept."""
    first, second = Writer.open(tmp_path), Writer.open(tmp_path)
    reader = ExemplarReader(tmp_path)
    observe(first, "/a", 0.2, 11)
    observe(second, "/a", 0.21, 22)
    observe(second, "/a", 99.0, 33)
    observe(first, "/b", 0.005, 44)
    assert traces(reader.read()) == {("/a", "0.25"): 22, ("/a", "+Inf"): 33, ("/b", "0.005"): 44}
    observe(first, "/a", 0.22, 55)
    found = reader.read()
    assert traces(found)["/a", "0.25"] == 55
    example = found[METRIC.name][BUCKET, (("http_route", "/a"), ("le", "0.25"))]
    assert (example.value, example.trace_id, example.span_id) == (0.22, f"{55:032x}", f"{1:016x}")
    first.close()
    second.close()


def test_a_bucket_is_written_once_per_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic does not write an example per request: a bucket keeps its own for the interval."""
    monkeypatch.setattr(exemplars, "INTERVAL", 60.0)
    writer = Writer.open(tmp_path)
    for trace_id in range(1, 100):
        observe(writer, "/a", 0.2, trace_id)
    observe(writer, "/a", 0.4, 100)
    assert traces(ExemplarReader(tmp_path).read()) == {("/a", "0.25"): 1, ("/a", "0.5"): 100}
    writer.close()


def test_the_file_is_bounded_and_the_oldest_bucket_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more buckets than records the file stays at its size and holds the latest ones."""
    monkeypatch.setattr(exemplars, "RECORDS", 8)
    writer = Writer.open(tmp_path)
    for number in range(1, 21):
        observe(writer, f"/{number}", 0.2, number)
    assert (tmp_path / file_name(0)).stat().st_size == 8 * 64
    assert set(traces(ExemplarReader(tmp_path).read()).values()) == set(range(13, 21))
    writer.close()


def test_a_torn_record_and_a_foreign_file_are_left_out(tmp_path: Path) -> None:
    """A record that was caught in the middle of a write, or is not ours, is no example; the others are."""
    writer = Writer.open(tmp_path)
    observe(writer, "/a", 0.2, 1)
    observe(writer, "/b", 0.2, 2)
    path = tmp_path / file_name(0)
    content = bytearray(path.read_bytes())
    content[10] ^= 0xFF
    path.write_bytes(content)
    (tmp_path / file_name(7)).write_bytes(b"x" * 640)
    (tmp_path / "exemplars_slotx.ring").write_bytes(b"")
    assert traces(ExemplarReader(tmp_path).read()) == {("/b", "0.25"): 2}
    writer.close()


def test_examples_of_the_last_owner_do_not_outlive_a_new_worker(tmp_path: Path) -> None:
    """A worker that takes over a slot begins without examples: their places may mean other buckets now."""
    writer = Writer.open(tmp_path)
    observe(writer, "/a", 0.2, 1)
    writer.close()
    observe(writer, "/a", 0.2, 2)  # a closed writer goes on in memory, without examples
    assert traces(ExemplarReader(tmp_path).read()) == {("/a", "0.25"): 1}
    again = Writer.open(tmp_path)
    assert ExemplarReader(tmp_path).read() == {}
    again.close()


def test_without_files_there_are_none(tmp_path: Path) -> None:
    """In memory nothing is kept, and a directory that is not there has no examples."""
    observe(Writer.in_memory(), "/a", 0.2, 1)
    assert ExemplarReader(tmp_path / "none").read() == {}


def test_openmetrics_shows_them_and_text_does_not(tmp_path: Path) -> None:
    """Prometheus' own parser finds each example at its bucket; the text form is as it was."""
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

    writer, reader = Writer.open(tmp_path), Reader(tmp_path)
    observe(writer, "/a", 0.2, 0xABC)
    writer.histogram(METRIC, "/none").observe(0.2)
    scraper = Scraper(Collector(reader), ExemplarReader(tmp_path))
    text = scraper.scrape(openmetrics=True).decode()
    found = {
        (sample.labels["http_route"], sample.labels["le"]): sample.exemplar
        for family in parse(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert list(found) == [("/a", "0.25")]
    example = found["/a", "0.25"]
    assert example.labels == {"trace_id": f"{0xABC:032x}", "span_id": f"{1:016x}"}
    assert example.value == 0.2
    families = reader.read().families
    assert b"trace_id" not in scraper.scrape()
    assert Renderer().render(families, openmetrics=True, exemplars={}) == Renderer().render(families, openmetrics=True)
    writer.close()


def test_a_warm_reader_says_the_same_as_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written, torn, reused, restarted or deleted between two reads, what was kept never shows."""
    monkeypatch.setattr(exemplars, "RECORDS", 6)
    random = Random(7)
    warm = ExemplarReader(tmp_path)
    writers: list[Writer | None] = [None] * 3
    held: list[tuple[Exemplars, Exemplars]] = []
    for step in range(400):
        number = random.randrange(3)
        writer = writers[number]
        if writer is None:
            writers[number] = Writer.open(tmp_path)
        elif random.random() < 0.04:
            writer.close()
            writers[number] = None
        else:
            for _ in range(random.randrange(4)):
                observe(writer, f"/{random.randrange(9)}", random.choice((0.2, 0.7)), step + 1)
        path = tmp_path / file_name(random.randrange(3))
        if path.exists() and random.random() < 0.1:
            if random.random() < 0.3:
                path.unlink()
            elif path.stat().st_size:
                content = bytearray(path.read_bytes())
                content[random.randrange(len(content))] ^= 0xFF
                path.write_bytes(content)
        found = warm.read()
        assert found == ExemplarReader(tmp_path).read()
        held.append((found, {name: dict(rows) for name, rows in found.items()}))
    assert all(then == copy for then, copy in held)
    assert len({str(copy) for _, copy in held}) > 100


def test_what_nobody_wrote_to_is_the_same_object(tmp_path: Path) -> None:
    """A family without a new example is not made anew, so that its rendered lines can be used again."""
    writer, reader = Writer.open(tmp_path), ExemplarReader(tmp_path)
    observe(writer, "/a", 0.2, 1)
    found = reader.read()
    assert reader.read() is found
    other = writer.histogram(catalog.TIME_TO_FIRST_BYTE, "/a")
    other.observe(0.2)
    writer.exemplar(other, 0.2, 2, 1)
    again = reader.read()
    assert set(again) == {METRIC.name, catalog.TIME_TO_FIRST_BYTE.name}
    assert again[METRIC.name] is found[METRIC.name]
    writer.close()
