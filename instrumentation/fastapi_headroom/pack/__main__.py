"""``python -m fastapi_headroom.pack``: build the pack into a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastapi_headroom.pack.build import build, stale
from fastapi_headroom.pack.rules import Links


def main(arguments: list[str] | None = None) -> int:
    """Build and print what was written; with ``--check`` write nothing and return 1 when a file is stale."""
    parser = argparse.ArgumentParser("python -m fastapi_headroom.pack", description="Build boards, rules and docs.")
    parser.add_argument("--to", type=Path, default=Path.cwd(), help="folder to write into (default: here)")
    base = Links().runbook_base
    parser.add_argument("--runbook-base", default=base, help="prefix of runbook_url (default: %(default)s)")
    parser.add_argument("--grafana-url", default="", help="address of Grafana before /d/... (default: relative)")
    parser.add_argument("--check", action="store_true", help="only say which files are stale")
    options = parser.parse_args(arguments)
    links = Links(runbook_base=options.runbook_base, grafana_url=options.grafana_url.rstrip("/"))
    if options.check:
        found = stale(options.to, links)
        for path in found:
            print(f"{path.relative_to(options.to)} is stale: run `make packs`", file=sys.stderr)
        return 1 if found else 0
    for path in build(options.to, links):
        print(path.relative_to(options.to))
    return 0


if __name__ == "__main__":
    sys.exit(main())
