"""Merging the columns of many files into families, to the numbers that prometheus_client would get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fastapi_headroom.store import layout
from fastapi_headroom.store.files import Layout, picker
from fastapi_headroom.store.layout import FileName
from fastapi_headroom.store.snapshot import Family, Labels, Rows

Column = Sequence[float]


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


class Totals:
    """The merged value of every series in one read; None where no file has it."""

    def __init__(self, size: int) -> None:
        self.values: list[float | None] = [None] * size
        self._groups: dict[tuple[str, Layout], list[Column]] = {}
        self._times: dict[int, float] = {}

    def add(self, mode: str, layout_: Layout, column: Column) -> None:
        """Take note of one file's values; they are merged by ``finish``."""
        self._groups.setdefault((mode, layout_), []).append(column)

    def add_recent(self, layout_: Layout, column: Column, times: Column) -> None:
        """Merge one file of gauges of which the latest write counts."""
        for number, value, time in zip(layout_.series, column, times, strict=True):
            if time > self._times.get(number, 0.0):
                self._times[number], self.values[number] = time, value

    def finish(self) -> list[float | None]:
        """Merge files of one layout column-wise, and then the layouts."""
        values = self.values
        for (mode, layout_), columns in self._groups.items():
            fold: Callable[[Iterable[float]], float] = {"min": min, "max": max}.get(mode, sum)
            merged = columns[0] if len(columns) == 1 else map(fold, zip(*columns, strict=True))
            if mode in ("min", "max"):
                for number, value in zip(layout_.series, merged, strict=True):
                    before = values[number]
                    values[number] = value if before is None else fold((before, value))
            else:
                for number, value in zip(layout_.series, merged, strict=True):
                    before = values[number]
                    values[number] = value if before is None else before + value
        return values


class Plan:
    """How totals become families: made once for a set of series, used until one comes or goes."""

    def __init__(self, index: SeriesIndex, present: Iterable[int]) -> None:
        families: dict[str, list[int]] = {}
        for number in present:
            series = index.series[number]
            members = families.setdefault(series.family, [])
            # Two kinds of one name cannot be exposed together: the first that was seen stays.
            if not members or index.series[members[0]].kind == series.kind:
                members.append(number)
        self._families = [
            _FamilyPlan(name, index, members) for name, members in sorted(families.items(), key=lambda item: item[0])
        ]

    def families(self, totals: Sequence[float | None]) -> list[Family]:
        """Return the families of one read."""
        return [plan.family(totals) for plan in self._families]


class _FamilyPlan:
    def __init__(self, name: str, index: SeriesIndex, members: list[int]) -> None:
        self.name, self.kind, self._help = name, index.series[members[0]].kind, index.help
        if self.kind != "histogram":
            members = sorted(members, key=lambda number: index.series[number].labels)
            self.rows = Rows(tuple((index.series[number].name, index.series[number].labels) for number in members))
            self._pick = picker(members)
            return
        sets: dict[Labels, tuple[dict[float, list[int]], list[int]]] = {}
        for number in members:
            labels = index.series[number].labels
            bound = next((text for label, text in labels if label == "le"), None)
            without = tuple(pair for pair in labels if pair[0] != "le")
            buckets, others = sets.setdefault(without, ({}, []))
            if bound is None:
                others.append(number)
            else:
                buckets.setdefault(float(bound), []).append(number)
        rows: list[tuple[str, Labels]] = []
        self._parts = []
        for labels, (buckets, others) in sorted(sets.items()):
            bounds = sorted(buckets)
            # Bounds that are spelled differently ("1" and "1.0") are one bucket: the row of the last one counts.
            cells = [number for bound in bounds for number in buckets[bound]]
            ends = [sum(len(buckets[bound]) for bound in bounds[: i + 1]) - 1 for i in range(len(bounds))]
            plain = len(cells) == len(bounds)
            others = [number for number in others if not (bounds and index.series[number].name == f"{name}_count")]
            rows += [(f"{name}_bucket", tuple(sorted((*labels, ("le", layout.bound_text(bound)))))) for bound in bounds]
            rows += [(index.series[number].name, labels) for number in others]
            if bounds:
                rows.append((f"{name}_count", labels))
            self._parts.append((picker(cells), None if plain else picker(ends), picker(others), bool(bounds)))
        self.rows = Rows(tuple(rows))

    def family(self, totals: Sequence[float | None]) -> Family:
        if self.kind != "histogram":
            return Family.of_rows(self.name, self.kind, self._help[self.name], self.rows, self._pick(totals))
        values: list[float] = []
        for pick_cells, pick_ends, pick_others, has_buckets in self._parts:
            cumulative: Sequence[float] = list(accumulate(pick_cells(totals)))
            values += cumulative if pick_ends is None else pick_ends(cumulative)
            values += pick_others(totals)
            if has_buckets:
                values.append(cumulative[-1])
        return Family.of_rows(self.name, self.kind, self._help[self.name], self.rows, values)
