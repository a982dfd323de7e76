"""One file as the reader keeps it: its keys parsed once, its numbers read again and again.

Files are read by ``pread``, never mapped: a file that somebody truncates would kill a process that has it
mapped. A descriptor that is kept open pins the inode, so an inode number that is still the same means the
same file; a file that is not pinned is parsed from its beginning each time.

Of a file with marks (see ``marks``) only the blocks that were written to are read again.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

from fastapi_headroom.store import layout, marks
from fastapi_headroom.store.layout import FileName

_FIRST_READ = 64 << 10
_LARGEST = 256 << 20
"""Bytes from which on a header is not believed."""
# A named pipe must not make the reader wait for somebody to open its other end.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
Pick = Callable[[Any], Sequence[Any]]
_CHUNK = 64
_UNSET = bytes(8)


class Layout:
    """The sequence of series in a file. Files with the same sequence share one."""

    __slots__ = ("__weakref__", "_places", "indexes", "is_plain", "pick", "series")

    def __init__(self, series: tuple[int, ...], indexes: tuple[int, ...]) -> None:
        self.series = series
        self.indexes = indexes
        self.pick = picker(indexes)
        self._places: array[int] | None = None
        self.is_plain = len(set(series)) == len(series)
        """Whether each series is there once only."""

    def pick_times(self, view: memoryview[float]) -> Sequence[float]:
        """Return the timestamps, which lie behind the values."""
        return [view[index + 1] for index in self.indexes]

    @property
    def places(self) -> array[int]:
        """The place of each series in the sequence, by its number; -1 where it is not, or beyond the end."""
        if self._places is None:
            places = array("i", [-1]) * (max(self.series, default=-1) + 1)
            for place, number in enumerate(self.series):
                places[number] = place
            self._places = places
        return self._places


def picker(indexes: Sequence[int]) -> Pick:
    """Return a function that takes the values at some indexes out of a view, always as a sequence."""
    if len(indexes) > 1:
        return itemgetter(*indexes)
    only = tuple(indexes)
    return lambda view: tuple(view[index] for index in only)


class Layouts:
    """All layouts in use, by what they hold."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[tuple[int, ...], tuple[int, ...]], Layout] = WeakValueDictionary()

    def get(self, series: tuple[int, ...], indexes: tuple[int, ...]) -> Layout:
        """Return the one layout of this content."""
        known = self._known.get((series, indexes))
        if known is None:
            known = self._known[series, indexes] = Layout(series, indexes)
        return known


class Buffer:
    """Memory that files are read into, one after the other; it grows to the largest."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_FIRST_READ))

    def read(self, fd: int, expected: int) -> int:
        """Read a file's used part and return its length in bytes; ``expected`` is what it was last time.

        Raises OSError, and TornFileError when the file is shorter than its header says.
        """
        have = self._fill(fd, 0, max(expected, 4096))
        if have == 0:
            return layout.HEADER  # prometheus_client makes a file and gives it its size in two steps
        used = layout.read_used(self.view[:have])
        if used > have:
            # A header that lies must not make us ask for memory.
            if used > min(os.fstat(fd).st_size, _LARGEST):
                raise layout.TornFileError(f"the header says that {used} bytes are used, the file is shorter")
            have += self._fill(fd, have, used)
            if used > have:
                raise layout.TornFileError(f"the header says that {used} bytes are used, {have} could be read")
        return used

    def _fill(self, fd: int, start: int, end: int) -> int:
        if end > len(self.view):
            larger = memoryview(bytearray(-(-end * 5 // 4 // _FIRST_READ) * _FIRST_READ))
            larger[:start] = self.view[:start]
            self.view = larger
        if hasattr(os, "preadv"):
            return os.preadv(fd, [self.view[start:end]], start)
        content = os.pread(fd, end - start, start)
        self.view[start : start + len(content)] = content
        return len(content)


class StoreFile:
    """One ``.db`` file. ``series_of`` turns a key into the number of its series, for this file's kind and mode."""

    def __init__(self, path: str, inode: int, name: FileName, series_of: Callable[[FileName, bytes], int]) -> None:
        self.inode, self.name = inode, name
        self.kind, self.mode = name.kind, name.mode.removeprefix("live")
        self._path, self._series_of = path, series_of
        self._fd = -1
        self._used = layout.HEADER
        self._may_be_marked = name.slot is not None and marks.are_kept_in(f"{name.kind}_")
        self._blocks: _Blocks | None = None
        self._before: list[float] | None = None
        self.layout: Layout | None = None
        self.column: list[float] = []
        """The value of each series of the layout, as last read."""
        self.times: Sequence[float] | None = None
        """When each was written, for gauges of which the latest write counts."""
        self.changed: Sequence[int] | None = None
        """Places in the column that the last read found changed; None when it did not look, or all is new."""

    def read(self, buffer: Buffer, layouts: Layouts, *, pin: bool) -> None:
        """Bring layout, column and times up to date.

        Raises OSError (FileNotFoundError when it is gone) and TornFileError.
        """
        self._before = None
        fd = self._fd if self._fd >= 0 else os.open(self._path, _FLAGS)
        try:
            if self._blocks is not None and self._fd >= 0 and pin:
                assert self.layout is not None
                changed = self._blocks.changed(fd, self.layout, self.column, self._used)
                if changed is not None:
                    self.changed = changed
                    return
            # What was marked is asked for before the values: a write in between is seen again next time.
            blocks = _Blocks.of(fd) if self._may_be_marked else None
            used = buffer.read(fd, self._used)
            if used < self._used or self._fd < 0:
                self.layout, self._used = None, layout.HEADER
            known = self.layout
            if used > self._used or known is None:
                self._parse(buffer, layouts, used)
            assert self.layout is not None
            view = buffer.view[:used].cast("d")
            before, self.column = self.column, list(self.layout.pick(view))
            times, self.times = self.times, self.layout.pick_times(view) if self.mode == "mostrecent" else None
            self.changed = None
            if self.layout is known and pin:
                if times == self.times:
                    self._before = before
                else:
                    self.changed = range(len(self.column))
            self._blocks = blocks
            if blocks is not None and not blocks.learn(fd, self.layout, used):
                self._blocks = None
        except BaseException:
            os.close(fd)
            self._fd, self.layout, self._used, self._blocks = -1, None, layout.HEADER, None
            raise
        if pin:
            self._fd = fd
        else:
            os.close(fd)
            self._fd = -1

    def compare(self) -> bool:
        """Find out what a read of the whole file changed, if it did not say; return whether that is known now."""
        if self.changed is None and self._before is not None:
            self.changed = _differences(self._before, self.column)
            self._before = None
        return self.changed is not None

    def forget(self) -> None:
        """Keep nothing that only a comparison needs."""
        self._before = None

    def _parse(self, buffer: Buffer, layouts: Layouts, used: int) -> None:
        start = self._used
        entries = layout.parse(buffer.view[start:used], 0, used - start, start)
        series = tuple(self._series_of(self.name, raw) for raw, _ in entries)
        indexes = tuple(index for _, index in entries)
        before = self.layout
        self.layout = layouts.get(
            (before.series if before else ()) + series, (before.indexes if before else ()) + indexes
        )
        self._used = used

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Blocks:
    """What the marks of a file said when it was last read."""

    def __init__(self, identity: tuple[int, int], table: int, flags: bytes, generations: bytes) -> None:
        self._identity, self._table = identity, table
        self._flags, self._generations = flags, generations
        self._starts: tuple[int, ...] = ()
        self._ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, fd: int) -> _Blocks | None:
        """Return the marks of a file, or None when it keeps none that can be trusted now."""
        identity = _identity(fd)
        table = identity[0] - marks.TABLE
        if table < layout.HEADER or os.pread(fd, 8, table) != marks.MAGIC:
            return None
        flags, generations = _flags_and_generations(fd, table, marks.AREA)
        # While the whole file is flagged its blocks may just be laid out anew.
        return cls(identity, table, flags, generations) if flags[:8] == _UNSET else None

    def learn(self, fd: int, known: Layout, used: int) -> bool:
        """Find out where the blocks are, after their values were read; return whether they can be used."""
        content = memoryview(os.pread(fd, marks.AREA, self._table)).cast("d")
        starts = content[1:].tolist()
        count = next((number for number, offset in enumerate(starts) if not layout.HEADER <= offset < used), None)
        offsets = [int(offset) for offset in starts[:count]]  # not before: a damaged table may hold what is no number
        # The first block begins where the entries do, and behind the last one nothing else is set.
        whole = not any(starts[len(offsets) :]) and offsets[:1] == [layout.HEADER][: used > layout.HEADER]
        if not whole or len(content) != marks.PLACES or any(lower >= upper for lower, upper in pairwise([0, *offsets])):
            return False
        ends = [*offsets[1:], used]
        # By place in the column; place 0 of the flags is that of the whole file.
        self._starts = tuple(bisect_left(known.indexes, offset // 8) for offset in offsets)
        self._ends = tuple(bisect_left(known.indexes, end // 8) for end in ends)
        size = (len(offsets) + 1) * 8
        self._flags, self._generations = self._flags[:size], self._generations[:size]
        return True

    def changed(self, fd: int, known: Layout, column: list[float], used: int) -> Sequence[int] | None:
        """Read the blocks that were written to into the column and return the places that changed.

        None when the whole file must be read. Raises OSError.
        """
        if _identity(fd) != self._identity or layout.read_used(os.pread(fd, layout.HEADER, 0)) != used:
            return None
        flags, generations = _flags_and_generations(fd, self._table, len(self._flags))
        if generations == self._generations and not flags.strip(b"\0"):
            return ()
        if flags[:8] != _UNSET or generations[:8] != self._generations[:8]:
            return None
        now, before = memoryview(generations).cast("d"), memoryview(self._generations).cast("d")
        set_ = memoryview(flags).cast("d")
        written = [number for number in range(1, len(now)) if set_[number] or now[number] != before[number]]
        if len(written) * 3 > len(now):
            return None
        changed: list[int] = []
        for number in written:
            first, end = self._starts[number - 1], self._ends[number - 1]
            if first == end:
                continue
            indexes = known.indexes[first:end]
            base = indexes[0]
            size = (indexes[-1] + 1 - base) * 8
            content = os.pread(fd, size, base * 8)
            if len(content) != size:
                raise layout.TornFileError(f"the file ends before the {used} bytes that its header says are used")
            view = memoryview(content).cast("d")
            for place, index in enumerate(indexes, first):
                value = view[index - base]
                if value != column[place]:
                    column[place] = value
                    changed.append(place)
        self._generations = generations
        return changed


def _flags_and_generations(fd: int, table: int, size: int) -> tuple[bytes, bytes]:
    """Read flags first and generations by a second call: see ``marks``."""
    flags = os.pread(fd, size, table + marks.AREA)
    return flags, os.pread(fd, size, table + 2 * marks.AREA)


def _identity(fd: int) -> tuple[int, int]:
    """Return size and time of modification. Writes to a mapping do not show there, all other writes do."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _differences(before: Sequence[float], now: Sequence[float]) -> list[int]:
    changed = []
    for start in range(0, len(now), _CHUNK):
        old, new = before[start : start + _CHUNK], now[start : start + _CHUNK]
        if old != new:
            changed += [start + place for place, value in enumerate(new) if value != old[place]]
    return changed
