"""The file format: the same bytes that prometheus_client writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.mmap_dict import MmapedDict, _read_all_values, mmap_key
from prometheus_client.utils import floatToGoString

from fastapi_headroom import catalog
from fastapi_headroom.store import layout
from fastapi_headroom.store.layout import FileName, TornFileError
from fastapi_headroom.store.writer import Writer

words = st.text(max_size=20)


@given(words, words, st.dictionaries(words, words, max_size=4), words)
def test_keys_are_those_of_prometheus_client(family: str, sample: str, labels: dict[str, str], text: str) -> None:
    """A key is made byte for byte as mmap_key makes it, and read back to what went in."""
    raw = layout.key(family, sample, labels, text)
    assert raw == mmap_key(family, sample, list(labels), list(labels.values()), text).encode()
    assert layout.parse_key(raw) == (family, sample, tuple(sorted(labels.items())), text)


def test_a_mock_of_json_dumps_sees_no_call_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the app's that counts calls of ``json.dumps`` counts its own only: FastAPI's test suite has two."""
    for name in ("dumps", "loads"):
        monkeypatch.setattr(json, name, lambda *_, **__: pytest.fail("called by us"))
    writer = Writer.open(tmp_path)
    writer.counter(catalog.REQUESTS, "/orders", "ok").inc()
    writer.close()


@given(st.floats(allow_nan=False) | st.integers(0, 10**9).map(float))
def test_bounds_are_spelled_as_prometheus_client_spells_them(bound: float) -> None:
    """The ``le`` label has Go's spelling of floats."""
    assert layout.bound_text(bound) == floatToGoString(bound)


@given(st.lists(st.tuples(st.text(min_size=1), st.floats(allow_nan=False)), unique_by=lambda item: item[0]))
def test_entries_are_read_back_by_prometheus_client(items: list[tuple[str, float]]) -> None:
    """Entries lie end to end, each value aligned to 8 bytes, and prometheus_client reads the same keys and values."""
    body = b"".join(layout.entry(key.encode(), value) for key, value in items)
    content = layout.used_header(8 + len(body)) + bytes(4) + body
    assert [(key, value) for key, value, _, _ in _read_all_values(content)] == items
    doubles = memoryview(content).cast("d")
    parsed = layout.parse(content, layout.HEADER, len(content))
    assert [(raw.decode(), doubles[index]) for raw, index in parsed] == items


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "shorter than its header"),
        (layout.used_header(-8) + bytes(4), "cannot be"),
        (layout.used_header(13) + bytes(4), "cannot be"),
        (layout.used_header(64) + bytes(52), "ends after"),
        (layout.used_header(32) + bytes(28), "reaches beyond"),
        (layout.used_header(32) + bytes(4) + layout.used_header(500) + bytes(20), "reaches beyond"),
        (layout.used_header(32) + bytes(4) + layout.used_header(-4) + bytes(20), "reaches beyond"),
    ],
)
def test_a_torn_file_is_told_from_a_whole_one(content: bytes, reason: str) -> None:
    """Headers and lengths that cannot be right are found before anything is believed."""
    with pytest.raises(TornFileError, match=reason):
        layout.parse(content, layout.HEADER, layout.read_used(content))


def test_file_names_tell_our_slots_from_process_ids() -> None:
    """A slot's file is ours, a number's is prometheus_client's, anything else is foreign."""
    assert FileName.parse(layout.file_name("counter", 3)) == FileName("counter", "", "slot3", 3)
    assert FileName.parse("gauge_livemax_slot12.db") == FileName("gauge", "livemax", "slot12", 12)
    assert FileName.parse("gauge_all_123.db") == FileName("gauge", "all", "123", None)
    for foreign in ("notes.db", "gauge_123.db", "gauge_odd_123.db", "counter.db", "counter_1.db.new"):
        assert FileName.parse(foreign) is None


def test_every_row_of_the_catalog_has_keys_of_its_own() -> None:
    """No two rows write the same key, and a histogram has its sum, its buckets and +Inf."""
    seen: set[bytes] = set()
    for metric in catalog.ALL:
        keys = layout.keys_of(metric, ["x"] * len(metric.labels))
        assert len(keys) == (len(metric.buckets) + 2 if metric.kind == "histogram" else 1)
        assert not seen & set(keys)
        seen |= set(keys)


def test_the_fingerprint_changes_with_what_keys_depend_on() -> None:
    """Another help text, other buckets or another mode are another release."""
    rows = [catalog.POOL_WAIT, catalog.POOL_COUNT]
    changed = [
        [dataclasses.replace(rows[0], help="Other."), rows[1]],
        [dataclasses.replace(rows[0], buckets=(1.0,)), rows[1]],
        [rows[0], dataclasses.replace(rows[1], mode="livemax")],
    ]
    assert len({layout.fingerprint(version) for version in [rows, *changed]}) == 4
    assert layout.fingerprint(rows) == layout.fingerprint(list(rows))


def test_a_file_of_prometheus_client_has_our_layout(tmp_path: Path) -> None:
    """What MmapedDict writes itself begins with the header and the entry that we would write."""
    path = tmp_path / "counter_1.db"
    peer = MmapedDict(str(path))
    peer.write_value("key", 1.5, 2.5)
    peer.close()
    assert path.read_bytes().startswith(layout.used_header(32) + bytes(4) + layout.entry(b"key", 1.5, 2.5))
