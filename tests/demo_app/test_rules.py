"""The demo's rules are the shipped ones with shorter time scales and nothing else changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from demo_app.stack.rules import format_duration, parse_duration, scale_expression, scale_rules, write_scaled

ALERTS = Path(__file__).parents[2] / "alerts"


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("0", 0), ("5m", 300_000), ("1h30m", 5_400_000), ("1d", 86_400_000), ("100ms", 100), ("1w", 604_800_000)],
)
def test_durations_are_read_as_prometheus_reads_them(text: str, milliseconds: int) -> None:
    """A duration becomes its milliseconds, and what is written back means the same."""
    assert parse_duration(text) == milliseconds
    assert parse_duration(format_duration(milliseconds)) == milliseconds


@pytest.mark.parametrize("text", ["", "5", "m5", "5 m", "1.5h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """Text that Prometheus would not take as a duration raises ValueError."""
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("expression", "scaled"),
    [
        ("rate(x[5m])", "rate(x[15s])"),
        ("rate(x[5m] offset 1d)", "rate(x[15s] offset 72m)"),
        ("rate(x[5m] offset -10m)", "rate(x[15s] offset -30s)"),
        ("max_over_time(rate(x[5m])[1h:1m])", "max_over_time(rate(x[15s])[3m:3s])"),
        ("max_over_time(x[1h:])", "max_over_time(x[3m:])"),
        ("max_over_time(up[1m])", "max_over_time(up[4s])"),
        ("job:errors:rate5m / job:requests:rate5m", "job:errors:rate5m / job:requests:rate5m"),
        ('rate(x{route="/a[5m] offset 1d"}[5m])', 'rate(x{route="/a[5m] offset 1d"}[15s])'),
        ("x > 60 # over [5m]", "x > 60 # over [5m]"),
        ('x{code=~"[0-9]+"}', 'x{code=~"[0-9]+"}'),
    ],
)
def test_ranges_and_offsets_are_divided(expression: str, scaled: str) -> None:
    """Ranges, subqueries and offsets shrink (ranges to four scrapes at least); names, strings, comments do not."""
    assert scale_expression(expression, 20) == scaled


def test_a_rule_keeps_all_but_its_times() -> None:
    """for, keep_firing_for and the interval shrink; labels and annotations that mention windows stay."""
    rule = {
        "alert": "A",
        "expr": "rate(x[1h]) > 1",
        "for": "2m",
        "keep_firing_for": "5m",
        "labels": {"window": "1h"},
        "annotations": {"description": "over 1h [5m]"},
    }
    group = {"name": "g", "interval": "1m", "rules": [rule, {"record": "a:rate5m", "expr": "rate(x[5m])"}]}
    scaled = scale_rules({"groups": [group]}, 20)["groups"][0]
    assert scaled == {
        "name": "g",
        "interval": "3s",
        "rules": [
            {**rule, "expr": "rate(x[3m]) > 1", "for": "6s", "keep_firing_for": "15s"},
            {"record": "a:rate5m", "expr": "rate(x[15s])"},
        ],
    }


def test_a_scale_of_one_changes_nothing() -> None:
    """SCALE=1 runs what is shipped, also ranges shorter than four scrapes; a scale of 0 is an error."""
    shipped = {"groups": [{"name": "g", "rules": [{"alert": "A", "expr": "rate(x[2s])", "for": "1h"}]}]}
    assert scale_rules(shipped, 1) == shipped
    with pytest.raises(ValueError, match="above 0"):
        scale_rules(shipped, 0)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_shipped_rules_scale_to_valid_rules(tmp_path: Path) -> None:
    """Every shipped rule file, days and all, is still accepted by promtool after scaling, with as many rules."""
    written = write_scaled(ALERTS, tmp_path, 20)
    assert [path.name for path in written] == [path.name for path in sorted(ALERTS.glob("*.rules.yml"))] != []
    for path in written:
        before, after = (yaml.safe_load((folder / path.name).read_text()) for folder in (ALERTS, tmp_path))
        assert [len(group["rules"]) for group in before["groups"]] == [len(group["rules"]) for group in after["groups"]]
        assert before != after or "HeadroomWatchdog" not in path.read_text()
    subprocess.run(["promtool", "check", "rules", *map(str, written)], check=True, capture_output=True)
