"""The file format of the store, as pure functions: prometheus_client's multiprocess files.

A file starts with a 4-byte integer, the number of bytes used, and 4 bytes of padding. Entries follow:
a 4-byte key length, the key (JSON, UTF-8) padded with spaces so that what follows is aligned to 8 bytes,
the value and a timestamp, both doubles. Alignment lets a ``memoryview.cast("d")`` reach every value by
an integer index. Histograms keep buckets that are not cumulative, and a sum.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from json import dumps, loads  # by name: a test of the app's that mocks json.dumps counts its own calls only
from mmap import mmap

from fastapi_headroom.catalog import Metric
from fastapi_headroom.errors import StoreError

HEADER = 8
"""Bytes before the first entry."""
VERSION = 2
"""Raised when our use of the format changes, so that files of another version are carried over."""
GAUGE_MODES = ("all", "liveall", "min", "livemin", "max", "livemax", "sum", "livesum", "mostrecent", "livemostrecent")

Buffer = bytes | bytearray | memoryview | mmap
_TOGETHER = 256
"""Keys that are parsed by one call."""
_length = struct.Struct("i")
_two_doubles = struct.Struct("dd")
_SLOT_FILE = re.compile(r"slot(\d+)")
_FILE = re.compile(rf"(?:(counter|histogram|summary)_(.+)|(gauge)_({'|'.join(GAUGE_MODES)})_([^_]+))\.db", re.DOTALL)


class TornFileError(StoreError):
    """A file of the store does not hold what its header says."""


@dataclass(frozen=True, slots=True)
class FileName:
    """What the name of a ``.db`` file says. ``slot`` is None for files of prometheus_client itself."""

    kind: str
    mode: str
    identifier: str
    slot: int | None

    @classmethod
    def parse(cls, name: str) -> FileName | None:
        """Return the parts of a file's name, or None when it is no file of the format."""
        match = _FILE.fullmatch(name)
        if match is None:
            return None
        kind, identifier = match[1] or match[3], match[2] or match[5]
        slot = _SLOT_FILE.fullmatch(identifier)
        return cls(kind, match[4] or "", identifier, int(slot[1]) if slot else None)


def stem_of(metric: Metric) -> str:
    """Return the first part of the name of the file that a metric lives in: ``gauge_livesum``, ``counter``."""
    return f"gauge_{metric.mode}" if metric.kind == "gauge" else metric.kind


def file_name(stem: str, slot: int) -> str:
    """Return the name of a slot's file. Never a bare number: that would be a pid to prometheus_client."""
    return f"{stem}_slot{slot}.db"


def key(family: str, sample: str, labels: dict[str, str], help_text: str) -> bytes:
    """Return the key of an entry, byte for byte what prometheus_client's ``mmap_key`` makes."""
    return dumps([family, sample, labels, help_text], sort_keys=True).encode()


def keys_of(metric: Metric, values: Sequence[str]) -> list[bytes]:
    """Return the keys of one series: one for a counter or gauge, the sum and then the counts for the others."""
    labels = dict(zip(metric.labels, values, strict=True))
    if metric.kind == "summary":
        return [key(metric.name, f"{metric.name}_{part}", labels, metric.help) for part in ("sum", "count")]
    if metric.kind != "histogram":
        return [key(metric.family, metric.name, labels, metric.help)]
    keys = [key(metric.name, f"{metric.name}_sum", labels, metric.help)]
    bounds = (bound_text(bound) for bound in (*metric.buckets, float("inf")))
    buckets = (key(metric.name, f"{metric.name}_bucket", labels | {"le": text}, metric.help) for text in bounds)
    return [*keys, *buckets]


def bound_text(bound: float) -> str:
    """Return a bucket's bound as the ``le`` label has it, which is how Go prints a float."""
    bound = float(bound)
    if bound == float("inf"):
        return "+Inf"
    if bound == float("-inf"):
        return "-Inf"
    text = repr(bound)
    point = text.find(".")
    if bound > 0 and point > 6:
        mantissa = f"{text[0]}.{text[1:point]}{text[point + 1 :]}".rstrip("0.")
        return f"{mantissa}e+{point - 1:02d}"
    return text


def parse_key(raw: bytes) -> tuple[str, str, tuple[tuple[str, str], ...], str]:
    """Return family, sample name, label pairs sorted by name, and help text of a key.

    Raises TornFileError for a key that is none. Text that UTF-8 cannot carry is replaced, so that a scrape
    can always be sent.
    """
    try:
        family, sample, labels, help_text = loads(raw)
        pairs = tuple(sorted((clean(name), clean(value)) for name, value in labels.items()))
        return clean(family), clean(sample), pairs, clean(help_text)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TornFileError(f"a key is not what prometheus_client writes: {raw[:80]!r}") from error


def clean(text: str) -> str:
    """Return text that UTF-8 can carry: a lone surrogate in a label must not break every scrape."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def entry(raw: bytes, value: float = 0.0, timestamp: float = 0.0) -> bytes:
    """Return the bytes of one entry. The value lies 16 bytes before its end."""
    padding = b" " * (8 - (len(raw) + 4) % 8)
    return head(raw) + padding + _two_doubles.pack(value, timestamp)


def head(raw: bytes) -> bytes:
    """Return the bytes of an entry that say which one it is."""
    return _length.pack(len(raw)) + raw


def value_index(offset: int, raw: bytes) -> int:
    """Return the index of an entry's value, in the file seen as doubles, by the offset at which the entry begins."""
    end = offset + 4 + len(raw)
    return (end + 8 - end % 8) // 8


def by_series(entries: Iterable[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    """Yield entries that lie one after the other, grouped: what a histogram or summary has follows its sum."""
    members: list[tuple[bytes, int]] = []
    family: bytes | None = None
    for raw, index in entries:
        is_sum = b'_sum", {' in raw
        if members and (is_sum or family is None or not raw.startswith(family)):
            yield members
            members = []
        if not members:
            family = raw[: raw.find(b'", "') + 4] if is_sum else None
        members.append((raw, index))
    if members:
        yield members


def used_header(used: int) -> bytes:
    """Return the first 4 bytes of a file of which ``used`` bytes hold entries."""
    return _length.pack(used)


def read_used(buffer: bytes | bytearray | memoryview) -> int:
    """Return how many bytes of a file are used, from its first bytes; at least the header.

    Raises TornFileError when the number cannot be right.
    """
    if len(buffer) < HEADER:
        raise TornFileError("the file is shorter than its header")
    used: int = _length.unpack_from(buffer)[0]
    if used == 0:
        return HEADER
    if used < HEADER or used % 8:
        raise TornFileError(f"the header says that {used} bytes are used, which cannot be")
    return used


def parse(buffer: Buffer, start: int, used: int, base: int = 0) -> list[tuple[bytes, int]]:
    """Return what ``walk`` yields."""
    return list(walk(buffer, start, used, base))


def walk(buffer: Buffer, start: int, used: int, base: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield the keys between two offsets, each with the index of its value in the file seen as doubles.

    ``base`` is the offset in the file at which the buffer begins. Raises TornFileError when an entry
    reaches beyond ``used`` or the buffer.
    """
    if used > len(buffer):
        raise TornFileError(f"the header says that {used} bytes are used, the file ends after {len(buffer)}")
    position = start
    while position < used:
        size: int = _length.unpack_from(buffer, position)[0]
        value_at = position + 4 + size + (8 - (size + 4) % 8)
        if size <= 0 or value_at + 16 > used:
            raise TornFileError(f"the entry at byte {position} reaches beyond the {used} bytes used")
        yield bytes(buffer[position + 4 : position + 4 + size]), (base + value_at) // 8
        position = value_at + 16


def checked(entries: Iterable[tuple[bytes, int]], *, is_histogram: bool) -> Iterator[tuple[bytes, int]]:
    """Yield the entries, after a look at their keys. Raises TornFileError for a key that a reader would refuse."""
    source = iter(entries)
    while some := list(islice(source, _TOGETHER)):
        try:
            rows = loads(b"[%b]" % b",".join([raw for raw, _ in some]))
            for family, sample, labels, help_text in rows:
                "".join((family, sample, help_text, *labels, *labels.values()))  # all of them are text
                if is_histogram and "le" in labels:
                    float(labels["le"])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TornFileError(f"a key is not what prometheus_client writes ({error})") from error
        if len(rows) != len(some):
            raise TornFileError("a key is not what prometheus_client writes")
        yield from some


def fingerprint(metrics: Iterable[Metric]) -> str:
    """Return a hash over all that keys depend on, which tells one release's files from another's."""
    rows = [(m.name, m.kind, m.labels, m.help, m.buckets, m.mode) for m in metrics]
    return hashlib.sha256(repr((VERSION, rows)).encode()).hexdigest()[:32]


def expose(entries: Iterable[tuple[bytes, float]], kind: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return entries of one kind as they are scraped: histograms cumulative, with their counts."""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    buckets: dict[tuple[str, tuple[tuple[str, str], ...]], dict[float, float]] = {}
    for raw, value in entries:
        family, name, labels, _ = parse_key(raw)
        bound = next((text for label, text in labels if label == "le"), None) if kind == "histogram" else None
        if bound is None:
            samples[name, labels] = samples.get((name, labels), 0.0) + value
        else:
            without = tuple(pair for pair in labels if pair[0] != "le")
            counts = buckets.setdefault((family, without), {})
            counts[float(bound)] = counts.get(float(bound), 0.0) + value
    for (family, labels), counts in buckets.items():
        total = 0.0
        for upper in sorted(counts):
            total += counts[upper]
            samples[f"{family}_bucket", tuple(sorted((*labels, ("le", bound_text(upper)))))] = total
        samples[f"{family}_count", labels] = total
    return samples
