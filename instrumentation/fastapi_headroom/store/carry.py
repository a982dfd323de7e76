"""Carrying a slot's counters over into a new release, whose help texts or buckets may differ."""

from __future__ import annotations

import json
from collections.abc import Iterable

from fastapi_headroom.catalog import Metric
from fastapi_headroom.store import layout


def carry_over(entries: Iterable[tuple[bytes, float]], kind: str, catalog: Iterable[Metric]) -> dict[bytes, float]:
    """Return the entries of a file of counters or histograms under the keys that the catalog gives them.

    A series is kept when its name and label names are those of the catalog, and a histogram when its
    buckets are, too. What cannot be matched is dropped: old buckets must not mix with new ones.
    """
    metrics = {metric.family: metric for metric in catalog if metric.kind == kind}
    found: dict[tuple[str, tuple[str, ...]], dict[str, float]] = {}
    for raw, value in entries:
        try:
            family, sample, labels, _ = json.loads(raw)
            metric = metrics[family]
            values = tuple(labels[name] for name in metric.labels)
            bound = labels.get("le", "") if kind == "histogram" and "le" not in metric.labels else ""
            extra = set(labels) - set(metric.labels) - ({"le"} if bound else set())
            hash(values)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if not extra:
            cells = found.setdefault((family, values), {})
            cells[f"{sample}{bound}"] = cells.get(f"{sample}{bound}", 0.0) + value
    kept: dict[bytes, float] = {}
    for (family, values), cells in found.items():
        keys = layout.keys_of(metrics[family], values)
        names = [_cell_name(raw) for raw in keys]
        if set(names) == set(cells):
            kept.update((raw, cells[name]) for raw, name in zip(keys, names, strict=True))
    return kept


def _cell_name(raw: bytes) -> str:
    _, sample, labels, _ = json.loads(raw)
    return f"{sample}{labels.get('le', '')}"
