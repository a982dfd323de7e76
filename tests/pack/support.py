"""What several tests of the pack need: the generated files, and the names in a PromQL expression."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastapi_headroom import catalog

ROOT = Path(__file__).resolve().parents[2]
BOARDS = sorted((ROOT / "dashboards").glob("headroom-*.json"))
RULE_FILES = sorted((ROOT / "alerts").glob("*.rules.yml"))
TEST_FILES = sorted((ROOT / "alerts" / "tests").glob("*.test.yml"))
OF_PROMETHEUS = {"up", "ALERTS"}

_WORDS = {
    *("sum", "min", "max", "avg", "count", "group", "topk", "by", "on", "and", "or", "unless", "offset", "ignoring"),
    *("group_left", "rate", "increase", "deriv", "histogram_quantile", "label_replace", "vector", "time", "sort"),
    *("max_over_time", "min_over_time", "avg_over_time", "last_over_time", "clamp_min", "end"),
}
_NOISE = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # strings
    r"|\{[^{}]*\}"  # matchers
    r"|\[[^\]]*\]"  # ranges
    r"|\b(?:by|on|ignoring|group_left)\s*\([^()]*\)"  # lists of labels
    r"|\boffset\s+\S+"
    r"|\b[0-9][0-9.e+-]*\b"
)


def metric_names() -> set[str]:
    """Return every series name that the catalog allows."""
    names = set(OF_PROMETHEUS)
    for metric in catalog.ALL:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.name + suffix for suffix in suffixes}
    return names


def names_in(expression: str) -> set[str]:
    """Return the names of series in an expression."""
    text = expression
    for _ in range(2):
        text = _NOISE.sub(" ", text)
    return set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", text)) - _WORDS


def load(board: Path) -> dict[str, Any]:
    """Return a board."""
    return json.loads(board.read_text(encoding="utf-8"))


def panels(board: Path) -> list[dict[str, Any]]:
    """Return the panels of a board, without its headings."""
    return [panel for panel in load(board)["panels"] if panel["type"] != "row"]


def expressions(board: Path) -> list[str]:
    """Return every query of a board: panels and annotations."""
    found = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    return found + [annotation["expr"] for annotation in load(board)["annotations"]["list"] if "expr" in annotation]


def rules() -> list[dict[str, Any]]:
    """Return every alert rule."""
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def tool(name: str) -> str:
    """Return the path of promtool or amtool, or skip the test."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian packages prometheus and prometheus-alertmanager)")
    return path
