"""Render families of samples as Prometheus text 0.0.4 or OpenMetrics 1.0.

The two forms share their sample lines; they differ in headers and in the end marker. What a line starts with
(name and escaped labels) is rendered once and kept with the rows of its family, and runs of 32 lines whose values are
those of the scrape before are used again: a warm scrape formats the numbers that changed, and little else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import isfinite
from operator import add

from fastapi_headroom import catalog
from fastapi_headroom.store.exemplars import Exemplar, Exemplars
from fastapi_headroom.store.reader import Family, Rows

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_NOT_IN_NAMES = re.compile(r"^[0-9]|[^a-zA-Z0-9_:]")
_NOT_IN_LABELS = re.compile(r"^[0-9]|[^a-zA-Z0-9_]")
_UNITS = {metric.family: metric.unit for metric in catalog.ALL if metric.unit}
_NO_EXEMPLARS: Exemplars = {}
_RUN = 32
"""Lines that are rendered together."""
_Row = tuple[str, tuple[tuple[str, str], ...]]
_Examples = Mapping[_Row, Exemplar]
_SPELLED = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}


class Renderer:
    """Renders scrape after scrape. Not for concurrent use."""

    def __init__(self) -> None:
        self._lines: dict[str, _Lines] = {}

    def render(
        self, families: Iterable[Family], *, openmetrics: bool = False, exemplars: Exemplars = _NO_EXEMPLARS
    ) -> bytes:
        """Return the exposition of the families, UTF-8 encoded, in their order; empty ones are left out.

        Exemplars are for OpenMetrics only: the text form has no place for them.
        """
        parts: list[str] = []
        lines: dict[str, _Lines] = {}
        for family in families:
            rows, values = family.rows, family.values
            if not values:
                continue
            kept = self._lines.get(family.name)
            if kept is None or kept.rows is not rows:
                kept = _Lines(rows)
            lines[family.name] = kept
            parts.append(_header(family, openmetrics=openmetrics))
            examples = exemplars.get(family.name) if openmetrics and family.kind == "histogram" else None
            parts += kept.render(values, examples)
        self._lines = lines  # families that are gone are forgotten
        if openmetrics:
            parts.append("# EOF\n")
        return "".join(parts).encode("utf-8", errors="replace")


class _Lines:
    """The lines of a family, in runs, as they were rendered last."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        if not rows.prefixes:
            rows.prefixes = tuple(_prefix(name, labels) for name, labels in rows.series)
        self._values: Sequence[float] = ()
        self._runs: list[str] = []
        self._examples: _Examples = {}
        self._places: dict[_Row, int] | None = None
        self._texts: dict[int, dict[int, str]] = {}  # by run, then by place in it
        self._with_examples: dict[int, tuple[str, dict[int, str], str]] = {}

    def render(self, values: Sequence[float], examples: _Examples | None) -> list[str]:
        """Return the lines, in parts that end with a line break. The list is not to be changed."""
        before = self._values
        if values is not before:
            if len(before) != len(values) or type(before) is not type(values):
                self._runs = [self._run(start, values) for start in range(0, len(values), _RUN)]
            else:
                for number, start in enumerate(range(0, len(values), _RUN)):
                    if values[start : start + _RUN] != before[start : start + _RUN]:
                        self._runs[number] = self._run(start, values)
            self._values = values
        return self._and_examples(examples) if examples else self._runs

    def _run(self, start: int, values: Sequence[float]) -> str:
        some = values[start : start + _RUN]
        numbers: Iterable[str] = map(repr, some)
        if not isfinite(sum(some)):
            numbers = (_SPELLED.get(number, number) for number in numbers)
        return "\n".join(map(add, self.rows.prefixes[start : start + _RUN], numbers)) + "\n"

    def _and_examples(self, examples: _Examples) -> list[str]:
        if self._places is None:
            self._places = {row: number for number, row in enumerate(self.rows.series)}
        if examples is not self._examples:
            self._texts = {}
            for row, found in examples.items():
                number = self._places.get(row)
                if number is not None:
                    self._texts.setdefault(number // _RUN, {})[number % _RUN] = (
                        f' # {{trace_id="{found.trace_id}",span_id="{found.span_id}"}} {found.value!r} {found.time:.3f}'
                    )
            self._examples = examples
        runs = self._runs.copy()
        for number, texts in self._texts.items():
            run = runs[number]
            known = self._with_examples.get(number)
            if known is None or known[0] is not run or known[1] != texts:
                lines = run.split("\n")
                for place, text in texts.items():
                    lines[place] += text
                known = self._with_examples[number] = (run, texts, "\n".join(lines))
            runs[number] = known[2]
        return runs


def _header(family: Family, *, openmetrics: bool) -> str:
    name, kind, text = _name(family.name), family.kind, family.help.replace("\\", r"\\").replace("\n", r"\n")
    if openmetrics:
        text = text.replace('"', r"\"")
        unit = _UNITS.get(name, "")
        unit_line = f"# UNIT {name} {unit}\n" if unit and name.endswith(f"_{unit}") else ""
        return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{unit_line}"
    if kind == "counter":
        name += "_total"
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _prefix(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return f"{_name(name)} "
    names = _label_names(tuple([label for label, _ in labels]))
    pairs = ",".join([f'{label}="{_escape(value)}"' for label, (_, value) in zip(names, labels, strict=True)])
    return f"{_name(name)}{{{pairs}}} "


@lru_cache(1024)
def _label_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return label names of the legacy character set, each once: of a name that is empty, reserved or there twice
    Prometheus refuses the whole scrape."""
    told: list[str] = []
    for name in names:
        text = _NOT_IN_LABELS.sub("_", name) or "_"
        if text.startswith("__"):
            text = f"exported{text}"
        while text in told:
            text += "_"
        told.append(text)
    return tuple(told)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _name(name: str) -> str:
    """Return a name of the legacy character set: a user's own metric may have any UTF-8 name."""
    return _NOT_IN_NAMES.sub("_", name) or "_"


def wants_openmetrics(accept: str) -> bool:
    """Return whether an ``Accept`` header names OpenMetrics, of version 1 or none. Nothing is weighed."""
    return any(
        media == "application/openmetrics-text" and not parameters.get("version", "1").startswith("0")
        for media, parameters in _accepted(accept)
    )


def wants_gzip(accept_encoding: str) -> bool:
    """Return whether an ``Accept-Encoding`` header allows gzip."""
    return any(coding == "gzip" for coding, _ in _accepted(accept_encoding))


def _accepted(header: str) -> list[tuple[str, dict[str, str]]]:
    """Return the items of an Accept header, lower-cased, with their parameters; without those of weight 0."""
    accepted = []
    for item in header.lower().split(","):
        media, *rest = (part.strip() for part in item.split(";"))
        parameters = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in rest)}
        if parameters.get("q", "1").strip("0."):
            accepted.append((media, parameters))
    return accepted
