"""The pool rows of each worker by itself: the reader merges workers, but a pool's size is a worker's own matter.

Keys are parsed once per file and numbers read again by ``pread``: a few kilobytes per worker, however large its file.
"""

from __future__ import annotations

import logging
import os
from array import array
from pathlib import Path
from typing import NamedTuple

from fastapi_headroom import catalog
from fastapi_headroom.advice.histogram import Histogram
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store import layout
from fastapi_headroom.store.layout import FileName

log = logging.getLogger("fastapi_headroom")

HISTOGRAMS = (catalog.POOL_USE, catalog.POOL_WAIT, catalog.POOL_DEMAND)
GAUGES = (catalog.POOL_MAX, catalog.DATABASE_CONNECTIONS_MAX)
_FILES = {layout.stem_of(metric) for metric in (*HISTOGRAMS, *GAUGES)}
_HEADS = tuple(f'["{metric.family}", '.encode() for metric in (*HISTOGRAMS, *GAUGES))
"""How the keys of these rows begin."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WIDEST = 256 << 10
"""Bytes from the first to the last number of one series beyond which the file is not believed."""
Place = tuple[int, str]
"""Worker slot and pool."""


class PoolRows(NamedTuple):
    """What one worker's pool counted since its slot was made: sum and buckets, and gauges."""

    counts: dict[Metric, array[float]]
    """By row of HISTOGRAMS: the sum, then the count of each bucket."""
    gauges: dict[Metric, float]

    def since(self, before: PoolRows | None, metric: Metric) -> Histogram:
        """Return what was observed since ``before``; all if that is None, and nothing where counters went back."""
        now = self.counts[metric]
        then = before.counts.get(metric) if before is not None else None
        values = [a - b for a, b in zip(now, then, strict=True)] if then is not None else list(now)
        if min(values) < -1e-6:
            values = [0.0] * len(values)
        return Histogram(metric.buckets, values[1:], max(0.0, values[0]))


class PoolReader:
    """Reads the pool rows of every slot of a store. Not for concurrent use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, _File] = {}

    def read(self) -> dict[Place, PoolRows]:
        """Return the rows of all slots, also of dead ones, whose numbers stand still.

        A file that cannot be read is left out; never raises OSError.
        """
        found: dict[Place, PoolRows] = {}
        wanted = self._listing()
        for gone in self._files.keys() - wanted.keys():
            del self._files[gone]
        for name, slot in sorted(wanted.items()):
            try:
                rows = self._read(name)
            except FileNotFoundError:
                self._files.pop(name, None)
                continue
            except (OSError, layout.TornFileError) as error:
                self._files.pop(name, None)
                log.debug("fastapi-headroom: %s is left out of the advice: %s", name, error)
                continue
            for (metric, pool), values in rows.items():
                place = found.setdefault((slot, pool), PoolRows({}, {}))
                if metric.kind == "histogram":
                    place.counts[metric] = values
                else:
                    place.gauges[metric] = values[0]
        return found

    def _listing(self) -> dict[str, int]:
        """Return the slot of each file that may hold pool rows."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except OSError:
            return {}
        parsed = ((name, FileName.parse(name)) for name in names)
        return {
            name: file.slot
            for name, file in parsed
            if file is not None and file.slot is not None and name.rpartition("_slot")[0] in _FILES
        }

    def _read(self, name: str) -> dict[tuple[Metric, str], array[float]]:
        fd = os.open(self._directory / name, _FLAGS)
        try:
            inode = os.fstat(fd).st_ino
            file = self._files.get(name)
            if file is None or file.inode != inode:
                file = self._files[name] = _File(inode)
            return file.read(fd)
        finally:
            os.close(fd)


class _File:
    """Where one file has its pool rows: index of each value, in the file seen as doubles."""

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self._used = layout.HEADER
        self._cells: dict[tuple[Metric, str], list[int]] = {}
        self._foreign: set[tuple[Metric, str]] = set()

    def read(self, fd: int) -> dict[tuple[Metric, str], array[float]]:
        used = layout.read_used(os.pread(fd, layout.HEADER, 0))
        if used < self._used:
            self._used, self._cells, self._foreign = layout.HEADER, {}, set()
        if used > self._used:
            self._parse(os.pread(fd, used - self._used, self._used), used)
        rows = {}
        for series, cells in self._cells.items():
            if -1 not in cells and series not in self._foreign:  # a series whose last bucket is being written
                rows[series] = _values(fd, cells)
        return rows

    def _parse(self, content: bytes, used: int) -> None:
        start = self._used
        for raw, index in layout.walk(content, 0, used - start, start):
            if not raw.startswith(_HEADS):  # nearly all of them
                continue
            family, sample, labels, _ = layout.parse_key(raw)
            metric, values = catalog.BY_NAME[family], dict(labels)
            bound = values.pop("le", "")
            if values.keys() != set(metric.labels):
                continue  # another release's, or not ours
            series = (metric, values[metric.labels[0]])
            cells = self._cells.setdefault(series, [-1] * (len(metric.buckets) + 2 if metric.buckets else 1))
            number = _number(metric, sample, bound)
            if number is None:
                self._foreign.add(series)  # another release's buckets: nothing to compare with
            else:
                cells[number] = index
        self._used = used


def _number(metric: Metric, sample: str, bound: str) -> int | None:
    """Return which of a series' cells a sample is; None for a bucket that this release has not."""
    if metric.kind != "histogram" or sample.endswith("_sum"):
        return 0
    bounds = [*map(layout.bound_text, (*metric.buckets, float("inf")))]
    return 1 + bounds.index(bound) if bound in bounds else None


def _values(fd: int, cells: list[int]) -> array[float]:
    first, last = min(cells), max(cells)
    length = 8 * (last - first + 1)
    if length > _WIDEST:
        raise layout.TornFileError("the buckets of one series lie too far apart")
    content = os.pread(fd, length, 8 * first)
    if len(content) < length:
        raise layout.TornFileError("the file is shorter than its header says")
    view = memoryview(content).cast("d")
    return array("d", [view[cell - first] for cell in cells])
