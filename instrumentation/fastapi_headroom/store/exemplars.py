"""Exemplars: for each bucket of a histogram, the trace of an observation that fell into it lately.

A worker keeps them in one small file beside its series, ``exemplars_slotN.ring`` (not ``.db``: it is none of
prometheus_client's). A record is 64 bytes: which value of ``histogram_slotN.db`` it explains, the observation, its
time, trace and span, and a checksum, because a reader may come in the middle of a write. A bucket has one record,
written once a second at most, so that traffic does not wash the rare slow request away; when all records are taken
the oldest bucket's goes.
"""

from __future__ import annotations

import os
import re
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from fastapi_headroom.store import layout
from fastapi_headroom.store.snapshot import Labels

RECORDS = 1024
"""Buckets with an exemplar in one worker: 64 KiB at most."""
INTERVAL = 1.0
"""Seconds that a bucket's exemplar stays at least."""
_RECORD = struct.Struct("<Qdd16s8sI12x")
_CHECKED = struct.Struct("<Qdd16s8s")
_VERSION = 1
_FILE = re.compile(r"exemplars_slot(\d+)\.ring")
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One observation and its trace. ``time`` is in seconds since 1970, the identifiers are hexadecimal."""

    value: float
    time: float
    trace_id: str
    span_id: str


Exemplars = dict[str, dict[tuple[str, Labels], Exemplar]]
"""By family, then by sample name and label pairs (of a bucket, with ``le``)."""


def file_name(slot: int) -> str:
    """Return the name of a slot's file of exemplars."""
    return f"exemplars_slot{slot}.ring"


class Ring:
    """The writing side, for one worker. Not for concurrent use; a write that fails ends it."""

    def __init__(self, path: Path, mode: int) -> None:
        """Make an empty file. Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _FLAGS, mode)
        os.fchmod(self._fd, mode)
        self._records: dict[int, tuple[int, float]] = {}

    def write(self, index: int, value: float, trace_id: int, span_id: int) -> None:
        """Keep an exemplar for the bucket whose value has this index in the histograms' file."""
        now = time.time()
        number, before = self._records.get(index, (-1, 0.0))
        if self._fd < 0 or 0.0 <= now - before < INTERVAL:
            return
        if number < 0:
            number = len(self._records)
            if number >= RECORDS:
                oldest = min(self._records, key=lambda known: self._records[known][1])
                number, _ = self._records.pop(oldest)
        self._records[index] = (number, now)
        fields = (index, value, now, trace_id.to_bytes(16, "big"), span_id.to_bytes(8, "big"))
        try:
            os.pwrite(self._fd, _RECORD.pack(*fields, _checksum(fields)), number * _RECORD.size)
        except OSError:
            self.close()  # no space: exemplars are the first thing to do without

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ExemplarReader:
    """The reading side: the latest exemplar of each bucket over all workers. Not for concurrent use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._buckets: dict[int, tuple[tuple[int, int], dict[int, int]]] = {}
        self._numbers: dict[_Bucket, int] = {}

    def read(self) -> Exemplars:
        """Read what is there; what cannot be read is left out. Never raises OSError."""
        latest: dict[int, _Found] = {}
        try:
            names = [path.name for path in self._directory.iterdir()]
        except OSError:
            names = []
        slots = {int(match[1]) for name in names if (match := _FILE.fullmatch(name))}
        for gone in self._buckets.keys() - slots:
            del self._buckets[gone]
        for slot in sorted(slots):
            try:
                self._read_slot(slot, latest)
            except (OSError, layout.TornFileError):
                continue
        families: Exemplars = {}
        buckets = list(self._numbers) if latest else []
        for number, (_, value, when, trace_id, span_id, _) in latest.items():
            family, name, labels = buckets[number]
            families.setdefault(family, {})[name, labels] = Exemplar(value, when, trace_id.hex(), span_id.hex())
        return families

    def _read_slot(self, slot: int, latest: dict[int, _Found]) -> None:
        content = _read_file(self._directory / file_name(slot), RECORDS * _RECORD.size)
        if len(content) < _RECORD.size:
            return
        buckets = self._buckets_of(slot)
        found: _Found
        for found in _RECORD.iter_unpack(content[: len(content) // _RECORD.size * _RECORD.size]):
            bucket = buckets.get(found[0])
            if bucket is not None:
                known = latest.get(bucket)
                if (known is None or known[2] < found[2]) and found[5] == _checksum(found[:5]):
                    latest[bucket] = found

    def _buckets_of(self, slot: int) -> dict[int, int]:
        """Return the number of the bucket that each index of a slot's histograms stands for.

        The file is parsed anew when it has grown or was replaced.
        """
        path = self._directory / layout.file_name("histogram", slot)
        status = path.stat()
        used = layout.read_used(_read_file(path, layout.HEADER))
        known = self._buckets.get(slot)
        if known is None or known[0] != (status.st_ino, used):
            entries = layout.parse(_read_file(path, used), layout.HEADER, used)
            numbers = self._numbers
            buckets = {
                index: numbers.setdefault(bucket, len(numbers))
                for raw, index in entries
                if (bucket := _bucket(raw)) is not None
            }
            known = self._buckets[slot] = ((status.st_ino, used), buckets)
        return known[1]


_Bucket = tuple[str, str, Labels]
_Found = tuple[int, float, float, bytes, bytes, int]
"""Index, value, time, trace, span and checksum."""


def _bucket(raw: bytes) -> _Bucket | None:
    family, name, labels, _ = layout.parse_key(raw)
    return (family, name, labels) if name == f"{family}_bucket" else None


def _checksum(fields: tuple[int, float, float, bytes, bytes]) -> int:
    return zlib.crc32(_CHECKED.pack(*fields), _VERSION)


def _read_file(path: Path, most: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS)
    try:
        return os.pread(fd, most, 0)
    finally:
        os.close(fd)
