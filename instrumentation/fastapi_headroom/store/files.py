"""One file as the reader keeps it: its keys parsed once, its numbers read again and again.

Files are read by ``pread``, never mapped: a file that somebody truncates would kill a process that has it
mapped. A descriptor that is kept open pins the inode, so an inode number that is still the same means the
same file; a file that is not pinned is parsed from its beginning each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any
from weakref import WeakValueDictionary

from fastapi_headroom.store import layout
from fastapi_headroom.store.layout import FileName

_FIRST_READ = 64 << 10
_LARGEST = 256 << 20
"""Bytes from which on a header is not believed."""
# A named pipe must not make the reader wait for somebody to open its other end.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
Pick = Callable[[Any], Sequence[Any]]


class Layout:
    """The sequence of series in a file. Files with the same sequence share one."""

    __slots__ = ("__weakref__", "indexes", "pick", "series")

    def __init__(self, series: tuple[int, ...], indexes: tuple[int, ...]) -> None:
        self.series = series
        self.indexes = indexes
        self.pick = picker(indexes)

    def pick_times(self, view: memoryview[float]) -> Sequence[float]:
        """Return the timestamps, which lie behind the values."""
        return [view[index + 1] for index in self.indexes]


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
        self.inode, self.name, self.failed = inode, name, ""
        self._path, self._series_of = path, series_of
        self._fd = -1
        self._used = layout.HEADER
        self.layout: Layout | None = None

    def read(self, buffer: Buffer, layouts: Layouts, *, pin: bool) -> memoryview[float]:
        """Bring the layout up to date and return the file as doubles, until the next read into the buffer.

        Raises OSError (FileNotFoundError when it is gone) and TornFileError.
        """
        fd = self._fd if self._fd >= 0 else os.open(self._path, _FLAGS)
        try:
            used = buffer.read(fd, self._used)
            if used < self._used or self._fd < 0:
                self.layout, self._used = None, layout.HEADER
            if used > self._used or self.layout is None:
                self._parse(buffer, layouts, used)
        except BaseException:
            os.close(fd)
            self._fd, self.layout, self._used = -1, None, layout.HEADER
            raise
        if pin:
            self._fd = fd
        else:
            os.close(fd)
            self._fd = -1
        return buffer.view[:used].cast("d")

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
