"""A mapped file of series, or the same in anonymous memory.

A file is sparse and mapped once, so indexes never move. Its space is reserved in steps before it is
written: a page that the file system cannot back would end the process by SIGBUS.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from math import isfinite
from pathlib import Path

from fastapi_headroom.store import layout
from fastapi_headroom.store.handles import MOVES, Handle
from fastapi_headroom.store.keys import Keys, follow, laid_out
from fastapi_headroom.store.marks import TABLE, Marks, are_kept_in
from fastapi_headroom.store.slot import has_name

CAPACITY = 16 << 20
"""Bytes of address space of one file; what is not reserved takes no memory."""
STEP = 64 << 10
"""Bytes that are reserved at a time."""


class FullError(Exception):
    """A region has no room for another series."""


class Region:
    """Series in one mapping. Callers hold the writer's lock, save for the handles' own writes."""

    __slots__ = ("_all", "_fd", "_gone", "_keys", "_map", "_path", "_reserved", "capacity", "handles", "is_marked",
                 "marks", "samples", "used", "view")  # fmt: skip

    def __init__(self, mapping: mmap.mmap, fd: int | None, used: int, reserved: int) -> None:
        self._map = mapping
        self._fd = fd
        self._path: Path | None = None
        self._reserved = reserved
        self.capacity = len(mapping)
        self.used = used
        self.view: memoryview[float] = memoryview(mapping).cast("d")
        self.marks = Marks(self.view, self.capacity)
        self.is_marked = False
        """Whether readers find marks in the file."""
        self.samples = 0
        """How many values are here."""
        self.handles: list[Handle] = []
        self._keys = Keys()
        self._all: dict[bytes, int] | None = None
        """Every key with the index of its value, once a series is met whose values do not all lie together."""
        self._gone: set[int] = set()
        """Indexes of values that have moved elsewhere."""

    @classmethod
    def anonymous(cls, capacity: int = CAPACITY) -> Region:
        """Make a region that no file backs."""
        return cls(_anonymous_map(capacity), None, layout.HEADER, capacity)

    @classmethod
    def create(cls, path: Path, capacity: int, mode: int, entries: Iterable[tuple[bytes, float]] = ()) -> Region:
        """Make a new file with these entries. It takes its name when it is whole, replacing what had it.

        Raises OSError when there is no space or no right to write.
        """
        region = cls.prepare(path, capacity, mode, entries)
        region.publish()
        return region

    @classmethod
    def prepare(cls, path: Path, capacity: int, mode: int, entries: Iterable[tuple[bytes, float]] = ()) -> Region:
        """Make a new file that readers do not see before ``publish`` has given it its name."""
        unnamed = _unnamed(path)
        unnamed.unlink(missing_ok=True)
        fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)
            content = b"".join(layout.entry(raw, value) for raw, value in entries)
            region = cls._map_file(fd, path, capacity, layout.HEADER + len(content))
            region._map[layout.HEADER : region.used] = content
            region._map[0:4] = layout.used_header(region.used)
            region._path = path
            region._take_note(_Contents(layout.walk(content, 0, len(content), layout.HEADER)))
        except BaseException:
            os.close(fd)
            unnamed.unlink(missing_ok=True)
            raise
        return region

    def publish(self) -> None:
        """Give a prepared file its name. Raises OSError."""
        assert self._path is not None
        _unnamed(self._path).rename(self._path)

    @classmethod
    def open(cls, path: Path, capacity: int) -> Region:
        """Map a file that is there and go on from its values.

        Raises FileNotFoundError, OSError for want of space, and TornFileError when it is damaged.
        """
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Read before it is mapped: what a short file does not hold must not be touched in the mapping.
            size = os.fstat(fd).st_size
            used = layout.read_used(os.pread(fd, layout.HEADER, 0))
            entries = layout.walk(_read(fd, min(used, size)), layout.HEADER, used)
            # A key that no reader can read would keep all of the file out of every scrape, restart after restart.
            contents = _Contents(layout.checked(entries, is_histogram=path.name.startswith("histogram")))
            region = cls._map_file(fd, path, max(capacity, size // 8 * 8), used)
        except BaseException:
            os.close(fd)
            raise
        region._path = path
        region._take_note(contents)
        return region

    @property
    def has_file(self) -> bool:
        """Whether the region maps a file, be it one that was deleted."""
        return self._fd is not None

    @property
    def is_file(self) -> bool:
        """Whether the region is a file that still has its name; False in memory and when somebody deleted it."""
        return self._fd is not None and self._path is not None and has_name(self._fd, self._path)

    def shares_file(self, other: Region) -> bool:
        """Return whether both map the same file."""
        if self._fd is None or other._fd is None:
            return False
        return os.path.samestat(os.fstat(self._fd), os.fstat(other._fd))

    def close(self) -> None:
        """Let go of the descriptor; the mapping goes with its last user."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @classmethod
    def _map_file(cls, fd: int, path: Path, capacity: int, used: int) -> Region:
        if used > capacity - TABLE:
            raise FullError
        if os.fstat(fd).st_size < capacity:
            os.ftruncate(fd, capacity)
        reserved = min(capacity, _round_up(used))
        _reserve(fd, 0, reserved)
        if are_kept_in(path.name):
            _reserve(fd, capacity - TABLE, TABLE)
        return cls(mmap.mmap(fd, capacity), fd, used, reserved)

    def place(self, keys: list[bytes]) -> list[int]:
        """Return the indexes of the values of a series by its keys; those that are missing are made together, at 0.

        Readers see all of the new ones or none. Raises FullError when the region is full and OSError
        when the file system is.
        """
        if self._all is None:
            offset = self._start(keys[0])
            if offset is None:
                return self._append(keys)
            found = follow(self._map, offset, keys)
            if len(found) == len(keys):
                return found
            self._all = dict(self.positions())  # other buckets than it had, say
        known = self._all
        missing = [raw for raw in keys if raw not in known]
        if missing:
            known.update(zip(missing, self._append(missing), strict=True))
        return [known[raw] for raw in keys]

    def has(self, first: bytes) -> bool:
        """Return whether there is a series with this first key."""
        return first in self._all if self._all is not None else self._start(first) is not None

    def positions(self) -> list[tuple[bytes, int]]:
        """Return every key with the index of its value. Not fast: the keys are read from the mapping."""
        used, gone = self.used, self._gone  # first: what comes meanwhile lies behind it
        entries = layout.walk(self._map, layout.HEADER, used)
        return [entry for entry in entries if entry[1] not in gone] if gone else list(entries)

    def forget(self, indexes: Iterable[int]) -> None:
        """Have the values at these indexes no more: they have moved elsewhere."""
        before = len(self._gone)
        self._gone.update(indexes)
        self.samples -= len(self._gone) - before
        self._all = dict(self.positions()) if self._all is not None else None

    def _start(self, first: bytes) -> int | None:
        offset = self._keys.start(self._map, first)
        return None if offset is None or layout.value_index(offset, first) in self._gone else offset

    def _append(self, keys: list[bytes]) -> list[int]:
        content = b"".join(map(layout.entry, keys))
        start, end = self.used, self.used + len(content)
        if end > self.capacity - TABLE:
            raise FullError
        if end > self._reserved:
            self._reserve_until(end)
        self._map[start:end] = content
        self.used = end
        if self.is_marked:
            self.marks.extend(start)
        # The entries are complete before the header speaks of them: readers take no lock.
        self._map[0:4] = layout.used_header(end)
        self._keys.add(self._map, keys[0], start)
        self.samples += len(keys)
        return laid_out(start, keys)

    def _take_note(self, contents: _Contents) -> None:
        assert self._path is not None
        self.samples = contents.samples
        for raw, offset in contents.series:
            self._keys.add(self._map, raw, offset)
        if are_kept_in(self._path.name):
            self.marks.begin(offset for _, offset in contents.series)
            self.is_marked = True

    def _reserve_until(self, end: int) -> None:
        reserved = min(self.capacity, _round_up(end))
        if self._fd is not None:
            _reserve(self._fd, self._reserved, reserved - self._reserved)
        self._reserved = reserved

    def drop_what_is_no_number(self) -> None:
        """Begin anew at 0 where an earlier owner counted an infinity or what is no number: nothing added ends that."""
        view = self.view
        for _, index in self.positions():
            if not isfinite(view[index]):
                view[index] = 0.0

    def detach(self, *, copy: bool) -> None:
        """Move to anonymous memory, with the values or with zeros; every handle follows, the file stays as it is."""
        mapping = _anonymous_map(self.capacity)
        mapping[0 : self.used] = self._map[0 : self.used]
        if not copy:
            values = memoryview(mapping).cast("d")
            for _, index in self.positions():
                values[index] = values[index + 1] = 0.0
        self._go_on_in(mapping)

    def abandon(self) -> None:
        """Send every handle to memory that nobody reads, and let go of the file: this is a forked child."""
        self._go_on_in(_anonymous_map(self.capacity))

    def _go_on_in(self, mapping: mmap.mmap) -> None:
        self.close()
        self._map, self._reserved = mapping, self.capacity
        # The old mapping goes when its last user has let go of it; closing it here could fail a running write.
        self.view = memoryview(mapping).cast("d")
        self.marks, self.is_marked = Marks(self.view, self.capacity), False
        for handle in self.handles:
            handle.view = self.view
        MOVES.count += 1

    def entries(self) -> list[tuple[bytes, float]]:
        """Return every key with its value."""
        return [(raw, self.view[index]) for raw, index in self.positions()]


class _Contents:
    """What the entries of a file are, as far as a region remembers it."""

    def __init__(self, entries: Iterable[tuple[bytes, int]]) -> None:
        self.samples = 0
        self.series: list[tuple[bytes, int]] = []
        """First key and offset of each series."""
        at = layout.HEADER
        for members in layout.by_series(entries):
            self.samples += len(members)
            self.series.append((members[0][0], at))
            at = members[-1][1] * 8 + 16


def _unnamed(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _round_up(size: int) -> int:
    return -(-size // STEP) * STEP


def _anonymous_map(capacity: int) -> mmap.mmap:
    return mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _read(fd: int, size: int) -> bytes:
    content = b""
    while len(content) < size and (chunk := os.pread(fd, size - len(content), len(content))):
        content += chunk
    return content


def _reserve(fd: int, start: int, length: int) -> None:
    """Have the file system set space aside. Raises OSError (ENOSPC, EDQUOT) when it has none."""
    if length <= 0:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, start, length)
        return
    # Writing is how space is reserved elsewhere; what is there already is written back as it is.
    written = os.pread(fd, length, start)
    os.pwrite(fd, written + bytes(length - len(written)), start)
