"""Merging the columns of many files into totals, to the numbers that prometheus_client would get.

A total that changed is summed anew from all files, in the order in which a first merge would: never adjusted by a
difference, which would drift. So what comes out is the same to the last bit however often was merged before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import add
from typing import Protocol

from fastapi_headroom.store import layout
from fastapi_headroom.store.files import Layout, picker
from fastapi_headroom.store.layout import FileName
from fastapi_headroom.store.snapshot import Labels

Fold = Callable[[Iterable[float]], float]
_GroupKey = tuple[str, str]
"""Kind and mode of files: what is merged with each other."""


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
        self._keys: dict[tuple[str, str, str], dict[bytes, int]] = {}
        """By kind, mode and process."""
        self._texts: dict[str, str] = {}
        self._pairs: dict[tuple[str, str], tuple[str, str]] = {}

    def number(self, file: FileName, raw: bytes) -> int:
        """Return the number of the series of a key. Raises TornFileError for a key that is none."""
        mode = file.mode.removeprefix("live")
        pid = file.identifier if mode == "all" else ""
        keys = self._keys.setdefault((file.kind, mode, pid), {})
        known = keys.get(raw)
        if known is None:
            family, name, labels, help_text = layout.parse_key(raw)
            if pid:
                # The app's own label of that name gives way, as prometheus_client has it.
                labels = tuple(sorted((dict(labels) | {"pid": pid}).items()))
            if file.kind == "histogram":
                _check_bound(labels, raw)
            shared = tuple([self._pairs.get(pair) or self._share(pair) for pair in labels])
            series = Series(file.kind, mode, self._text(family), self._text(name), shared)
            known = self._numbers.setdefault(series, len(self.series))
            if known == len(self.series):
                self.series.append(series)
            self.help[family] = help_text  # a key that is new may be that of a newer release
            keys[raw] = known
        return known

    def _share(self, pair: tuple[str, str]) -> tuple[str, str]:
        """Return a label's name and value as the one object that all series have: most have few of their own."""
        return self._pairs.setdefault(pair, (self._text(pair[0]), self._text(pair[1])))

    def _text(self, text: str) -> str:
        return self._texts.setdefault(text, text)


def _check_bound(labels: Labels, raw: bytes) -> None:
    bound = dict(labels).get("le", "0")
    try:
        float(bound)
    except ValueError:
        raise layout.TornFileError(f"a bucket's bound is no number: {raw[:80]!r}") from None


class Column(Protocol):
    """The values of one file, or of one region in memory."""

    kind: str
    mode: str
    layout: Layout | None

    @property
    def column(self) -> Sequence[float]:
        """One value per series of the layout."""

    @property
    def times(self) -> Sequence[float] | None:
        """When each was written, for gauges of which the latest write counts."""

    @property
    def changed(self) -> Sequence[int] | None:
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
        self._groups: dict[_GroupKey, list[tuple[Layout, list[Column]]]] = {}
        self._recent: list[Column] = []
        self._is_plain = False

    def merge(self, columns: Sequence[Column], size: int) -> set[int] | None:
        """Bring the totals of ``size`` series up to date; return the series that changed, None for all of them."""
        groups = self._changed(columns, size)
        # Beyond a quarter it is cheaper to merge whole columns.
        if groups is None or sum(map(len, groups.values())) * 4 > size:
            self._merge_all(columns, size)
            return None
        changed: set[int] = set()
        for group, numbers in groups.items():
            self._sum_anew(group, sorted(numbers))
            changed |= numbers
        recent = [number for column in self._recent if column.layout for number in column.layout.series]
        if recent and any(column.changed for column in self._recent):
            for number in recent:
                self.totals[number] = None
            self._merge_recent()
            changed.update(recent)
        return changed

    def _changed(self, columns: Sequence[Column], size: int) -> dict[_GroupKey, set[int]] | None:
        """Return the series that changed, by kind and mode of their files; None when all must be merged."""
        inputs = [(id(column), column.layout) for column in columns]
        if not self._is_plain or size != len(self.totals) or inputs != self._inputs:
            return None
        # Where much was read as a whole, looking for what is the same in it would cost more than merging all.
        unknown = sum(len(column.column) for column in columns if column.changed is None)
        if unknown * 4 > sum(len(column.column) for column in columns):
            return None
        changed: dict[_GroupKey, set[int]] = {}
        for column in columns:
            if column.changed is None and not column.compare():
                return None
            if column.changed and column.layout is not None and column.times is None:
                series = column.layout.series
                changed.setdefault((column.kind, column.mode), set()).update(
                    [series[place] for place in column.changed]
                )
        return changed

    def _merge_all(self, columns: Sequence[Column], size: int) -> None:
        """Merge files of one layout column-wise, and then the layouts."""
        self._inputs = [(id(column), column.layout) for column in columns]
        self._columns = columns  # an id is that of one object as long as the object lives
        groups: dict[tuple[_GroupKey, Layout], list[Column]] = {}
        self._recent = []
        for column in columns:
            if column.times is not None:
                self._recent.append(column)
            elif column.layout is not None:
                groups.setdefault(((column.kind, column.mode), column.layout), []).append(column)
        self._groups = {}
        for (group, layout_), members in groups.items():
            self._groups.setdefault(group, []).append((layout_, members))
        self._is_plain = all(layout_.is_plain for _, layout_ in groups)
        values: list[float | None] = [None] * size
        for ((_, mode), layout_), members in groups.items():
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

    def _sum_anew(self, group: _GroupKey, numbers: list[int]) -> None:
        """Merge some series, which all live in files of one kind and mode, in the order of ``_merge_all``."""
        merged: dict[int, float] = {}
        in_order = False
        fold = _FOLDS.get(group[1], sum)
        for layout_, members in self._groups[group]:
            places = layout_.places
            if numbers[-1] >= len(places) or -1 in (found := picker(numbers)(places)):
                here = [number for number in numbers if number < len(places) and places[number] >= 0]
                if not here:
                    continue
                found = picker(here)(places)
            else:
                here = numbers
            pick = picker(found)
            lists = [pick(member.column) for member in members]
            values = lists[0] if len(lists) == 1 else map(fold, zip(*lists, strict=True))
            if not merged:
                merged = dict(zip(here, values, strict=True))
                in_order = len(here) == len(numbers)
            elif in_order and fold is sum and len(here) == len(numbers):
                merged = dict(zip(here, map(add, merged.values(), values), strict=True))
            else:
                for number, value in zip(here, values, strict=True):
                    before = merged.get(number)
                    if before is None:
                        merged[number] = value
                    else:
                        merged[number] = before + value if fold is sum else fold((before, value))
        for number in numbers:
            self.totals[number] = merged.get(number)

    def _merge_recent(self) -> None:
        times: dict[int, float] = {}
        for column in self._recent:
            assert column.layout is not None and column.times is not None
            for number, value, time in zip(column.layout.series, column.column, column.times, strict=True):
                if time > times.get(number, 0.0):
                    times[number], self.totals[number] = time, value


_FOLDS: dict[str, Fold] = {"min": min, "max": max}
"""How gauges of a mode are merged where they are not summed."""
