"""The one table, printed and as Markdown, with what a reader must know of the machine and the versions."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measuring import Row

HEADINGS = ("what", "headroom", "peer", "peer / headroom", "promised", "")
LIBRARIES = (
    "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "prometheus-client",
    "prometheus-fastapi-instrumentator", "starlette-exporter", "opentelemetry-sdk",
    "opentelemetry-instrumentation-fastapi", "SQLAlchemy", "asyncpg", "redis",
)  # fmt: skip
Sections = Mapping[str, Sequence[Row]]


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's text, in the order of HEADINGS."""
    ratio = "" if row.ratio is None else f"{'over ' if row.more_than else ''}{row.ratio:.1f}x"
    promised = []
    if row.budget is not None:
        promised.append(f"at most {row.budget:g} {row.unit}")
    if row.least is not None:
        promised.append(f"at least {row.least:g}x")
    verdict = {True: "kept", False: "MISSED", None: ""}[row.met]
    return row.what, _number(row.here, row.unit), _number(row.peer, row.unit), ratio, ", ".join(promised), verdict


def as_text(rows: Iterable[Row]) -> str:
    """Return aligned lines."""
    return _aligned([HEADINGS, *map(cells, rows)])


def whole_text(sections: Sections) -> str:
    """Return one aligned table with a heading line per section."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    for title, rows in sections.items():
        lines += [("",) * len(HEADINGS), (title.upper(), *[""] * (len(HEADINGS) - 1)), *map(cells, rows)]
    return _aligned(lines)


def as_markdown(sections: Sections, notes: Mapping[str, str]) -> str:
    """Return the page that is kept: the same table, by section, with what each section measures."""
    text = "# What it costs\n\nWritten by `make bench`. " + conditions() + "\n"
    for title, rows in sections.items():
        text += f"\n## {title}\n\n{notes[title]}\n\n"
        text += "| " + " | ".join(HEADINGS) + " |\n|---|--:|--:|--:|--:|---|\n"
        text += "".join("| " + " | ".join(cells(row)) + " |\n" for row in rows)
    return text


def conditions() -> str:
    """Return the date, the class of machine and the versions, and nothing that names a host."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = []
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0]
    return (
        f"{day}; {os.cpu_count()} cores, {_processor()}, {platform.system()} {platform.machine()}, "
        f"{platform.python_implementation()} {platform.python_version()}; {', '.join(found)}. "
        f"Load average at the end of the run: {load:.1f} (1 is the run itself; what is above comes from other work)."
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f} {unit}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        padded = [line[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        text += "  ".join((*padded, line[-1])).rstrip() + "\n"
    return text
