"""The reading side of the store: merges the files of all workers into one snapshot.

Reads what our writer and prometheus_client write, with the semantics of prometheus_client's
``MultiProcessCollector``; besides, live gauges of slots whose worker is dead are left out. A file that is
torn, truncated or foreign is skipped, named in ``Snapshot.unreadable`` and, once, in the log.

What makes it fast: keys are parsed once and blocks that nobody wrote to are not read again (``files``, ``marks``);
files of one layout are summed column-wise, and later on those series only that changed (``merge``); a family in which
nothing changed is the same object as before, and its ``rows`` are as long as no series comes or goes (``plan``), so
the exposition can keep what it derives from them.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi_headroom import catalog
from fastapi_headroom.store import layout, memory, slot
from fastapi_headroom.store.files import Buffer, Layout, Layouts, StoreFile
from fastapi_headroom.store.layout import FileName, TornFileError
from fastapi_headroom.store.memory import Held
from fastapi_headroom.store.merge import Column, Merger, SeriesIndex
from fastapi_headroom.store.plan import Plan
from fastapi_headroom.store.snapshot import Family, Rows, Snapshot

__all__ = ["Family", "Reader", "Rows", "Snapshot", "held_here"]

log = logging.getLogger("fastapi_headroom")
_MANY = 65_536
_GRACE_SECONDS = 2.0
_SUM = "sum"
_OF_DEGRADED = FileName("gauge", catalog.STORE_DEGRADED.mode, "", None)
_MOST_NAMED = 100
"""Files that are skipped and named in the log, each once: something may make new ones without end."""
_FORGET_BEYOND = 10_000
"""Series that are gone may be remembered up to this many, or as many as there are."""


@dataclass(slots=True, eq=False)
class _Held:
    """A column that is new in each read."""

    kind: str
    mode: str
    layout: Layout | None
    column: Sequence[float]
    times: Sequence[float] | None = None
    changed: Sequence[int] | None = None

    def compare(self) -> bool:
        return False


def held_here(directory: Path) -> bool:
    """Return whether this process holds series of a store in memory that only a reader in this process can show."""
    with memory.standing(directory) as held:
        return bool(held)


class Reader:
    """Reads one directory, again and again. Not for concurrent use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._buffer = Buffer()
        self._files: dict[str, StoreFile] = {}
        self._locks: dict[str, tuple[int, int]] = {}
        self._reported: set[str] = set()
        self._silent: dict[int, float] = {}
        # Descriptors are kept open (see ``files``), but half of them are left to the rest of the process.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._pins = _MANY if limit == resource.RLIM_INFINITY else limit // 2
        self._planned: tuple[int, frozenset[int]] = (0, frozenset())
        self._forget_series()

    def read(self) -> Snapshot:
        """Merge what all workers wrote until now. A directory that is not there is empty. Never raises OSError."""
        with memory.standing(self._directory) as held:
            return self._read(held)

    def _read(self, held: list[Held]) -> Snapshot:
        try:
            with os.scandir(self._directory) as entries:
                listing = sorted((entry.name, entry.inode()) for entry in entries)
        except OSError as error:
            listing = []
            if not isinstance(error, FileNotFoundError):
                self._report(str(self._directory), error)
        snapshot = Snapshot(alive=self._alive([item for item in listing if item[0].endswith(".lock")]))
        changed = self._merge([item for item in listing if item[0].endswith(".db")], held, snapshot)
        totals = self._merger.totals
        absent = self._planned[1]
        if changed is None or any((totals[number] is None) != (number in absent) for number in changed):
            changed = None
            absent = frozenset(number for number, value in enumerate(totals) if value is None)
            if (len(totals), absent) != self._planned:
                self._plan = Plan(self._index, [number for number in range(len(totals)) if number not in absent])
                self._planned = (len(totals), absent)
        snapshot.families = self._plan.families(totals, changed)
        if len(absent) > max(_FORGET_BEYOND, len(totals) - len(absent)):
            self._forget_series()
        return snapshot

    def close(self) -> None:
        """Let go of all files. The reader can be used again."""
        for file in self._files.values():
            file.close()
        for _, fd in self._locks.values():
            os.close(fd)
        self._files.clear()
        self._locks.clear()

    def _alive(self, listing: list[tuple[str, int]]) -> list[int]:
        """Return the slots whose lock is held."""
        for name in self._locks.keys() - {name for name, _ in listing}:
            os.close(self._locks.pop(name)[1])
        alive = []
        for name, inode in listing:
            match = slot.LOCK_FILE.fullmatch(name)
            if match is None:
                continue
            try:
                known = self._locks.get(name)
                if known is None or known[0] != inode:
                    if known is not None:
                        os.close(self._locks.pop(name)[1])
                    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # it may be a pipe
                    known = self._locks[name] = (inode, os.open(self._directory / name, flags))
                if slot.is_held(known[1]):
                    alive.append(int(match[1]))
            except OSError as error:
                self._report(name, error)
        return sorted(alive)

    def _merge(self, listing: list[tuple[str, int]], held: list[Held], snapshot: Snapshot) -> set[int] | None:
        for gone in self._files.keys() - {name for name, _ in listing}:
            self._files.pop(gone).close()
        alive = set(snapshot.alive)
        read = []
        for name, inode in listing:
            file = self._file(name, inode)
            if file is None:
                snapshot.unreadable.append(name)
            elif not (file.name.slot is not None and file.name.mode.startswith("live") and file.name.slot not in alive):
                read.append((name, file))
        columns: list[Column] = []
        pins = self._pins - len(self._locks)
        for number, (name, file) in enumerate(read):
            try:
                file.read(self._buffer, self._layouts, pin=number < pins)
            except FileNotFoundError:
                continue  # it went between the listing and now, as live gauges do when a worker restarts
            except (OSError, TornFileError) as error:
                snapshot.unreadable.append(name)
                self._report(name, error)
                continue
            columns.append(file)
        columns += [self._column(part) for part in held]
        if degraded := self._degraded_elsewhere(listing, held, snapshot):
            number = self._index.number(_OF_DEGRADED, layout.keys_of(catalog.STORE_DEGRADED, [])[0])
            columns.append(_Held("gauge", _SUM, self._layouts.get((number,), (0,)), (float(degraded),)))
        snapshot.unreadable.sort()
        changed = self._merger.merge(columns, len(self._index.series))
        for _, file in read:
            file.forget()
        return changed

    def _column(self, part: Held) -> Column:
        """Return what this process holds in memory as if it were a file."""
        identifier = "memory" if part.slot is None else f"slot{part.slot}"
        name = FileName.parse(f"{part.stem}_{identifier}.db")
        assert name is not None
        positions = part.region.positions()
        series = tuple(self._index.number(name, raw) for raw, _ in positions)
        layout_ = self._layouts.get(series, tuple(index for _, index in positions))
        mode = name.mode.removeprefix("live")
        view = part.region.view
        return _Held(
            name.kind, mode, layout_, layout_.pick(view), layout_.pick_times(view) if mode == "mostrecent" else None
        )

    def _degraded_elsewhere(self, listing: list[tuple[str, int]], held: list[Held], snapshot: Snapshot) -> int:
        """Return how many workers of other processes live but write no files: theirs is all in memory.

        A worker that has just claimed its slot gets some time to make them.
        """
        names = {name for name, _ in listing}
        silent = set(snapshot.alive) - {part.slot for part in held}
        silent = {
            slot for slot in silent if layout.file_name(layout.stem_of(catalog.STORE_DEGRADED), slot) not in names
        }
        now = time.monotonic()
        self._silent = {number: self._silent.get(number, now) for number in silent}
        return sum(now - since >= _GRACE_SECONDS for since in self._silent.values())

    def _file(self, name: str, inode: int) -> StoreFile | None:
        file = self._files.get(name)
        if file is not None and file.inode == inode:
            return file
        if file is not None:
            self._files.pop(name).close()
        parsed = FileName.parse(name)
        if parsed is None:
            self._report(name, TornFileError("its name is none that prometheus_client or fastapi-headroom gives"))
            return None
        file = self._files[name] = StoreFile(str(self._directory / name), inode, parsed, self._index.number)
        return file

    def _report(self, name: str, error: Exception) -> None:
        if name in self._reported or len(self._reported) > _MOST_NAMED:
            return
        self._reported.add(name)
        log.warning("fastapi-headroom: %s in %s is skipped: %s", name, self._directory, error)
        if len(self._reported) > _MOST_NAMED:
            log.warning(
                "fastapi-headroom: further files of %s that are skipped are counted and not named", self._directory
            )

    def _forget_series(self) -> None:
        """Start with no series known: those of files that are gone must not pile up."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._index = SeriesIndex()
        self._layouts = Layouts()
        self._merger = Merger()
        self._plan = Plan(self._index, ())
        self._planned = (0, frozenset())
