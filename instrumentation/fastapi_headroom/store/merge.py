"""Merging the columns of many files into totals, to the numbers that prometheus_client would get.

A total that changed is summed anew from all files, in the order in which a first merge would: never adjusted by a
difference, which would drift. So what comes out is the same to the last bit however often was merged before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi_headroom.store import layout
from fastapi_headroom.store.files import Layout
from fastapi_headroom.store.layout import FileName
from fastapi_headroom.store.snapshot import Labels

Fold = Callable[[Iterable[float]], float]


@dataclass(frozen=True, slots=True)
class Series:
    """What identifies a value across files. The help text does not: releases may differ in it."""

    kind: str
    mode: str
    family: str
    name: str
    labels: Labels


class SeriesIndex:
    """Numbers for series, so that merging handles integers. A key is parsed once however many files have it."""

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.help: dict[str, str] = {}
        self._numbers: dict[Series, int] = {}
        self._keys: dict[tuple[str, str, str, bytes], int] = {}

    def number(self, file: FileName, raw: bytes) -> int:
        """Return the number of the series of a key. Raises TornFileError for a key that is none."""
        mode = file.mode.removeprefix("live")
        pid = file.identifier if mode == "all" else ""
        known = self._keys.get((file.kind, mode, pid, raw))
        if known is None:
            family, name, labels, help_text = layout.parse_key(raw)
            if pid:
                labels = tuple(sorted((*labels, ("pid", pid))))
            if file.kind == "histogram":
                _check_bound(labels, raw)
            series = Series(file.kind, mode, family, name, labels)
            known = self._numbers.setdefault(series, len(self.series))
            if known == len(self.series):
                self.series.append(series)
            self.help[family] = help_text  # a key that is new may be that of a newer release
            self._keys[file.kind, mode, pid, raw] = known
        return known


def _check_bound(labels: Labels, raw: bytes) -> None:
    bound = dict(labels).get("le", "0")
    try:
        float(bound)
    except ValueError:
        raise layout.TornFileError(f"a bucket's bound is no number: {raw[:80]!r}") from None


class Column(Protocol):
    """The values of one file, or of one region in memory."""

    mode: str
    layout: Layout | None
    column: Sequence[float]
    times: Sequence[float] | None
    """Of gauges of which the latest write counts."""
    changed: Sequence[int] | None
    """Places that changed since the merge before; None when that is not known."""

    def compare(self) -> bool:
        """Find out what changed, if that was left open; return whether it is known now."""


class Merger:
    """Merges read after read: all columns when files or series come or go, else the series that changed."""

    def __init__(self) -> None:
        self.totals: list[float | None] = []
        """The merged value of every series; None where no file has it."""
        self._inputs: list[tuple[int, Layout | None]] = []
        self._columns: Sequence[Column] = ()
        self._groups: list[tuple[Fold, Layout, list[Column]]] = []
        self._recent: list[Column] = []
        self._is_plain = False

    def merge(self, columns: Sequence[Column], size: int) -> set[int] | None:
        """Bring the totals of ``size`` series up to date; return the series that changed, None for all of them."""
        changed = self._changed(columns, size)
        # Beyond a quarter it is cheaper to merge whole columns.
        if changed is None or len(changed) * 4 > size:
            self._merge_all(columns, size)
            return None
        for number in changed:
            self.totals[number] = self._total(number)
        recent = [number for column in self._recent if column.layout for number in column.layout.series]
        if recent and any(column.changed for column in self._recent):
            for number in recent:
                self.totals[number] = None
            self._merge_recent()
            changed.update(recent)
        return changed

    def _changed(self, columns: Sequence[Column], size: int) -> set[int] | None:
        """Return the series that changed, None when all must be merged."""
        inputs = [(id(column), column.layout) for column in columns]
        if not self._is_plain or size != len(self.totals) or inputs != self._inputs:
            return None
        # Where much was read as a whole, looking for what is the same in it would cost more than merging all.
        unknown = sum(len(column.column) for column in columns if column.changed is None)
        if unknown * 4 > sum(len(column.column) for column in columns):
            return None
        changed: set[int] = set()
        for column in columns:
            if column.changed is None and not column.compare():
                return None
            if column.changed and column.layout is not None and column.times is None:
                series = column.layout.series
                changed.update([series[place] for place in column.changed])
        return changed

    def _merge_all(self, columns: Sequence[Column], size: int) -> None:
        """Merge files of one layout column-wise, and then the layouts."""
        self._inputs = [(id(column), column.layout) for column in columns]
        self._columns = columns  # an id is that of one object as long as the object lives
        groups: dict[tuple[str, Layout], list[Column]] = {}
        self._recent = []
        for column in columns:
            if column.times is not None:
                self._recent.append(column)
            elif column.layout is not None:
                groups.setdefault((column.mode, column.layout), []).append(column)
        self._groups = [
            (_FOLDS.get(mode, sum), layout_, members) for (mode, layout_), members in groups.items()
        ]
        self._is_plain = all(layout_.is_plain for _, layout_, _ in self._groups)
        values: list[float | None] = [None] * size
        for (mode, layout_), members in groups.items():
            fold = _FOLDS.get(mode, sum)
            lists = [member.column for member in members]
            merged = lists[0] if len(lists) == 1 else map(fold, zip(*lists, strict=True))
            if mode in _FOLDS:
                for number, value in zip(layout_.series, merged, strict=True):
                    before = values[number]
                    values[number] = value if before is None else fold((before, value))
            else:
                for number, value in zip(layout_.series, merged, strict=True):
                    before = values[number]
                    values[number] = value if before is None else before + value
        self.totals = values
        self._merge_recent()

    def _total(self, number: int) -> float | None:
        """Merge one series in the order of ``_merge_all``."""
        total: float | None = None
        for fold, layout_, members in self._groups:
            places = layout_.places
            place = places[number] if number < len(places) else -1
            if place >= 0:
                if len(members) == 1:
                    value = members[0].column[place]
                else:
                    value = fold([member.column[place] for member in members])
                if total is None:
                    total = value
                else:
                    total = total + value if fold is sum else fold((total, value))
        return total

    def _merge_recent(self) -> None:
        times: dict[int, float] = {}
        for column in self._recent:
            assert column.layout is not None and column.times is not None
            for number, value, time in zip(column.layout.series, column.column, column.times, strict=True):
                if time > times.get(number, 0.0):
                    times[number], self.totals[number] = time, value


_FOLDS: dict[str, Fold] = {"min": min, "max": max}
"""How gauges of a mode are merged where they are not summed."""
