"""``make bench``: runs every benchmark in a process of its own, prints one table and writes ``results.md``.

python -m benchmarks [--quick] [--only NAME,...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import Row
from benchmarks.report import as_markdown, whole_text

RESULTS = Path(__file__).with_name("results.md")
BENCHMARKS = {
    "request": "Whole requests",
    "bytecodes": "What a request executes",
    "query": "A request with one query and one cache read",
    "store": "Store and scrape",
    "pool": "Pool",
    "pools": "Pools of other libraries",
    "cache": "Cache",
    "startup": "Start-up",
    "memory": "Memory",
}
"""Names of the modules ``bench_NAME``, and what their part of the table is called."""


def main() -> int:
    """Run the benchmarks; return 1 when one of them failed. A missed budget is shown, and is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shows in a minute that everything runs; writes nothing")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, comma-separated; writes nothing")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    sections: dict[str, list[Row]] = {}
    failed = []
    for name in names:
        began = time.monotonic()
        sys.stderr.write(f"{BENCHMARKS[name]} ...")
        sys.stderr.flush()
        rows = run(name, quick=arguments.quick)
        if rows is None:
            failed.append(name)
        else:
            sections[BENCHMARKS[name]] = rows
        sys.stderr.write(f" {time.monotonic() - began:.0f} s\n")
    sys.stdout.write("\n" + whole_text(sections))
    if failed:
        sys.stdout.write(f"\nfailed: {', '.join(failed)}\n")
    elif not arguments.quick and names == list(BENCHMARKS):
        RESULTS.write_text(as_markdown(sections, {BENCHMARKS[name]: note(name) for name in names}))
        sys.stdout.write(f"\nwritten to {RESULTS.relative_to(RESULTS.parents[1])}\n")
    return 1 if failed else 0


def run(name: str, *, quick: bool) -> list[Row] | None:
    """Return the rows of one benchmark, or None when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            f"benchmarks.bench_{name}",
            "--rows",
            str(file),
            *(["--quick"] if quick else []),
        ]
        if subprocess.run(command, check=False).returncode:
            return None
        return [Row(**row) for row in json.loads(file.read_text())]


def note(name: str) -> str:
    """Return what a benchmark says of itself."""
    return (importlib.import_module(f"benchmarks.bench_{name}").__doc__ or "").strip()


if __name__ == "__main__":
    raise SystemExit(main())
