"""How totals become families: worked out once for a set of series, and used until one comes or goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from fastapi_headroom.store import layout
from fastapi_headroom.store.files import picker
from fastapi_headroom.store.merge import SeriesIndex
from fastapi_headroom.store.snapshot import Family, Labels, Rows


class Plan:
    """The families of a set of series. A family in which nothing changed is the same object in read after read."""

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
        # Where a series is shown: which family, and which of its parts. None shows it if its kind is the wrong one.
        self._shown: dict[int, tuple[int, int]] = {}
        for place, family in enumerate(self._families):
            for part, numbers in enumerate(family.members):
                self._shown.update((number, (place, part)) for number in numbers)
        self._made: list[Family] = []

    def families(self, totals: Sequence[float | None], changed: Iterable[int] | None) -> list[Family]:
        """Return the families of one read; ``changed`` names the series that changed since the one before."""
        if changed is None or not self._made:
            self._made = [plan.family(totals) for plan in self._families]
            return list(self._made)
        parts: dict[int, set[int]] = {}
        for number in changed:
            shown = self._shown.get(number)
            if shown is not None:
                parts.setdefault(shown[0], set()).add(shown[1])
        for place, numbers in parts.items():
            self._made[place] = self._families[place].changed(self._made[place], totals, numbers)
        return list(self._made)


class _FamilyPlan:
    """One family. ``members`` are the series of each of its parts: single rows, or whole histograms."""

    def __init__(self, name: str, index: SeriesIndex, members: list[int]) -> None:
        self.name, self.kind, self._help = name, index.series[members[0]].kind, index.help
        self.members: list[list[int]] = []
        self._offsets: list[int] = []
        """Of the rows of each part."""
        if self.kind != "histogram":
            members = sorted(members, key=lambda number: index.series[number].labels)
            self.rows = Rows(tuple((index.series[number].name, index.series[number].labels) for number in members))
            self.members = [[number] for number in members]
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
        bucket = f"{name}_bucket"
        self._parts = []
        for labels, (buckets, others) in sorted(sets.items()):
            bounds = sorted(buckets)
            # Bounds that are spelled differently ("1" and "1.0") are one bucket: the row of the last one counts.
            cells = [number for bound in bounds for number in buckets[bound]]
            ends = [sum(len(buckets[bound]) for bound in bounds[: i + 1]) - 1 for i in range(len(bounds))]
            plain = len(cells) == len(bounds)
            others = [number for number in others if not (bounds and index.series[number].name == f"{name}_count")]
            self._offsets.append(len(rows))
            rows += [(bucket, _with_bound(index.series[buckets[bound][-1]].labels, labels, bound)) for bound in bounds]
            rows += [(index.series[number].name, labels) for number in others]
            if bounds:
                rows.append((f"{name}_count", labels))
            self.members.append([*cells, *others])
            self._parts.append((picker(cells), None if plain else picker(ends), picker(others), bool(bounds)))
        self.rows = Rows(tuple(rows))

    def family(self, totals: Sequence[float | None]) -> Family:
        """Return the family of these totals."""
        if self.kind != "histogram":
            return self._of(list(self._pick(totals)))
        values: list[float] = []
        for part in range(len(self._parts)):
            values += self._histogram(part, totals)
        return self._of(values)

    def changed(self, before: Family, totals: Sequence[float | None], parts: Iterable[int]) -> Family:
        """Return the family of these totals, which differ from those before in some parts only."""
        values = list(before.values)  # whoever holds the one before must not see it change
        for part in parts:
            if self.kind == "histogram":
                new = self._histogram(part, totals)
                offset = self._offsets[part]
                values[offset : offset + len(new)] = new
            else:
                values[part] = totals[self.members[part][0]]  # type: ignore[assignment]  # those shown are there
        return self._of(values)

    def _histogram(self, part: int, totals: Sequence[float | None]) -> list[float]:
        pick_cells, pick_ends, pick_others, has_buckets = self._parts[part]
        cumulative: list[float] = list(accumulate(pick_cells(totals)))
        values: list[float] = list(cumulative if pick_ends is None else pick_ends(cumulative))
        values += pick_others(totals)
        if has_buckets:
            values.append(cumulative[-1])
        return values

    def _of(self, values: Sequence[float]) -> Family:
        return Family.of_rows(self.name, self.kind, self._help[self.name], self.rows, values)


def _with_bound(own: Labels, without: Labels, bound: float) -> Labels:
    """Return a bucket's labels with its bound as we spell it: its own as a rule, which are there already."""
    pair = ("le", layout.bound_text(bound))
    return own if pair in own else tuple(sorted((*without, pair)))
