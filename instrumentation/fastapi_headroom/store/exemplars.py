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
"""The start of a record, over which its checksum is."""
_RUN = 8 * _RECORD.size
"""Bytes that are compared together."""
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
    """The reading side: the latest exemplar of each bucket over all workers. Not for concurrent use.

    Only records that were written since the last read are looked at, and a family in which nothing changed is the
    same object as before.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = _Numbers()
        self._slots: dict[int, _Slot] = {}
        self._latest: dict[int, _Found] = {}
        self._families: Exemplars = {}

    def read(self) -> Exemplars:
        """Read what is there; what cannot be read is left out. Never raises OSError."""
        try:
            names = os.listdir(self._directory)  # noqa: PTH208 - a Path for each name costs more than all the rest
        except OSError:
            names = []
        slots = {int(match[1]) for name in names if (match := _FILE.fullmatch(name))}
        changed: set[int] = set()
        lost = False
        for gone in self._slots.keys() - slots:
            lost |= bool(self._slots.pop(gone).records)
        for number in sorted(slots):
            slot = self._slots.get(number)
            if slot is None:
                slot = self._slots[number] = _Slot(self._directory, number)
            try:
                lost |= slot.read(self._numbers, self._latest, changed)
            except (OSError, layout.TornFileError):
                lost |= bool(self._slots.pop(number).records)
        if lost:
            changed.update(self._latest)
            self._find_all()
            changed.update(self._latest)
        if changed:
            self._make(changed)
        return self._families

    def _find_all(self) -> None:
        """Find the latest of each bucket among all records: what was the latest is gone."""
        latest = self._latest = dict[int, _Found]()
        for _, slot in sorted(self._slots.items()):
            for found in slot.records:
                bucket = slot.buckets.get(found[0])
                if bucket is not None:
                    known = latest.get(bucket)
                    if (known is None or known[2] < found[2]) and found[5] == _checksum(found[:5]):
                        latest[bucket] = found

    def _make(self, changed: set[int]) -> None:
        """Bring the families of some buckets up to date, in copies: whoever holds the ones before keeps them so."""
        families, copied = dict(self._families), set[str]()
        for number in changed:
            family, name, labels = self._numbers.buckets[number]
            if family not in copied:
                copied.add(family)
                families[family] = dict(families.get(family, {}))
            found = self._latest.get(number)
            if found is None:
                families[family].pop((name, labels), None)
            else:
                families[family][name, labels] = Exemplar(found[1], found[2], found[3].hex(), found[4].hex())
        self._families = {name: rows for name, rows in families.items() if rows}


class _Slot:
    """One worker's exemplars as last read."""

    def __init__(self, directory: Path, number: int) -> None:
        self._ring = directory / file_name(number)
        self._histograms = directory / layout.file_name("histogram", number)
        self._content = b""
        self._known: tuple[int, int] = (-1, 0)
        self.records: list[_Found] = []
        """As they are in the file; some may be torn."""
        self.buckets: dict[int, int] = {}
        """The number of the bucket that each index of the histograms stands for."""

    def read(self, numbers: _Numbers, latest: dict[int, _Found], changed: set[int]) -> bool:
        """Take what was written since into the latest, and note which buckets changed.

        Returns whether a record is gone, so that the latest must be found anew. Raises OSError and TornFileError.
        """
        content = _read_file(self._ring, RECORDS * _RECORD.size)
        content = content[: len(content) // _RECORD.size * _RECORD.size]
        if not content and not self.records:
            return False
        inode = self._histograms.stat().st_ino
        if content == self._content and inode == self._known[0]:
            return False
        before, self._content = self._content, content
        if self._learn(inode, numbers) or len(content) < len(before):
            self.records = list(_RECORD.iter_unpack(content))
            return True
        lost = False
        for start in range(0, len(content), _RUN):
            run = content[start : start + _RUN]
            if run != before[start : start + _RUN]:
                lost |= self._take(run, start // _RECORD.size, latest, changed)
        return lost

    def _take(self, run: bytes, place: int, latest: dict[int, _Found], changed: set[int]) -> bool:
        """Take some records, of which the first one has this place."""
        records, buckets, lost = self.records, self.buckets, False
        olds = records[place : place + len(run) // _RECORD.size]
        news: list[_Found] = list(_RECORD.iter_unpack(run))
        records[place : place + len(news)] = news
        for number, found in enumerate(news):
            old = olds[number] if number < len(olds) else None
            if found == old:
                continue
            bucket = buckets.get(found[0])
            if bucket is not None:
                known = latest.get(bucket)
                if known is None or known[2] < found[2]:
                    start = number * _RECORD.size
                    if found[5] == zlib.crc32(run[start : start + _CHECKED.size], _VERSION):
                        latest[bucket] = found
                        changed.add(bucket)
                        if old is None or old[0] == found[0]:
                            continue
            if old is not None:
                before = buckets.get(old[0])
                lost |= before is not None and latest.get(before) == old
        return lost

    def _learn(self, inode: int, numbers: _Numbers) -> bool:
        """Learn which bucket each index of the histograms stands for; return whether another file is meant now.

        The file is parsed anew when it was replaced, and from where it ended when it has grown.
        """
        before, start = self._known
        used = layout.read_used(_read_file(self._histograms, layout.HEADER))
        if before != inode or used < start:
            self.buckets, start = {}, layout.HEADER
        entries = layout.walk(_read_file(self._histograms, used - start, start), 0, used - start, start)
        for raw, index in entries:
            number = numbers.of(raw)
            if number is not None:
                self.buckets[index] = number
        self._known = (inode, used)
        return before != inode


class _Numbers:
    """Numbers for buckets. A key is parsed once, however many workers have it."""

    def __init__(self) -> None:
        self.buckets: list[_Bucket] = []
        self._by_key: dict[bytes, int | None] = {}
        self._by_bucket: dict[_Bucket, int] = {}

    def of(self, raw: bytes) -> int | None:
        """Return the number of a key's bucket; None for a key that is no bucket's."""
        if raw not in self._by_key:
            bucket = _bucket(raw)
            number = None
            if bucket is not None:
                number = self._by_bucket.setdefault(bucket, len(self.buckets))
                if number == len(self.buckets):
                    self.buckets.append(bucket)
            self._by_key[raw] = number
        return self._by_key[raw]


_Bucket = tuple[str, str, Labels]
_Found = tuple[int, float, float, bytes, bytes, int]
"""Index, value, time, trace, span and checksum."""


def _bucket(raw: bytes) -> _Bucket | None:
    family, name, labels, _ = layout.parse_key(raw)
    return (family, name, labels) if name == f"{family}_bucket" else None


def _checksum(fields: tuple[int, float, float, bytes, bytes]) -> int:
    return zlib.crc32(_CHECKED.pack(*fields), _VERSION)


def _read_file(path: Path, most: int, start: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS)
    try:
        return os.pread(fd, most, start)
    finally:
        os.close(fd)
