"""Shortens the time scales of Prometheus rules mechanically, so that a demo of minutes shows what takes hours.

Ranges, subqueries, offsets, ``for``, ``keep_firing_for`` and the groups' intervals are divided by one factor.
Thresholds, names of recorded series (``job:errors:rate5m``), labels and annotations stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_UNITS = {"y": 31_536_000_000, "w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_DURATION = r"(?:\d+(?:ms|[ywdhms]))+"
_TOKENS = re.compile(
    r"""(?P<literal>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`|\#[^\n]*)"""
    rf"""|\[\s*(?P<range>{_DURATION})\s*(?P<colon>:\s*(?P<step>{_DURATION})?\s*)?\]"""
    rf"""|(?P<offset>\boffset\s+-?\s*)(?P<shift>{_DURATION})"""
)


def parse_duration(text: str) -> int:
    """Return the milliseconds of a Prometheus duration such as ``1d``, ``1h30m`` or ``100ms``. Raises ValueError."""
    if text == "0":
        return 0
    if not re.fullmatch(_DURATION, text):
        raise ValueError(f"{text!r} is no duration as Prometheus writes them")
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[ywdhms])", text))


def format_duration(milliseconds: int) -> str:
    """Return a Prometheus duration, in the largest unit that divides it."""
    if milliseconds == 0:
        return "0s"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if milliseconds % _UNITS[unit] == 0)
    return f"{milliseconds // _UNITS[unit]}{unit}"


def scale_expression(expression: str, factor: float, *, shortest_range: float = 4.0, step: float = 1.0) -> str:
    """Return a PromQL expression with ranges and offsets divided by ``factor``.

    ``shortest_range`` is in seconds: a rate over less than four scrapes is noise. ``step`` is the least step of
    a subquery, in seconds.
    """

    def replace(found: re.Match[str]) -> str:
        if found["literal"] is not None:
            return found["literal"]
        if found["shift"] is not None:
            return found["offset"] + _scaled(found["shift"], factor)
        window = _scaled(found["range"], factor, shortest_range)
        if found["colon"] is None:
            return f"[{window}]"
        return f"[{window}:{_scaled(found['step'], factor, step) if found['step'] else ''}]"

    return _TOKENS.sub(replace, expression)


def scale_rules(rules: dict[str, Any], factor: float, *, scrape_interval: float = 1.0) -> dict[str, Any]:
    """Return a rule file's content with its time scales divided by ``factor``; 1 leaves all as it is."""
    if factor <= 0:
        raise ValueError(f"the scale must be above 0, not {factor:g}")
    if factor == 1:
        return rules
    return {**rules, "groups": [_scale_group(group, factor, scrape_interval) for group in rules.get("groups", [])]}


def write_scaled(source: Path, target: Path, factor: float, *, scrape_interval: float = 1.0) -> list[Path]:
    """Write the ``*.rules.yml`` of a folder, scaled, into another; return what was written."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(source.glob("*.rules.yml")):
        scaled = scale_rules(yaml.safe_load(path.read_text()), factor, scrape_interval=scrape_interval)
        written.append(target / path.name)
        written[-1].write_text(yaml.safe_dump(scaled, sort_keys=False, width=1_000))
    return written


def _scale_group(group: dict[str, Any], factor: float, scrape_interval: float) -> dict[str, Any]:
    scaled = {**group, "rules": [_scale_rule(rule, factor, scrape_interval) for rule in group["rules"]]}
    if "interval" in group:
        scaled["interval"] = _scaled(group["interval"], factor, scrape_interval)
    return scaled


def _scale_rule(rule: dict[str, Any], factor: float, scrape_interval: float) -> dict[str, Any]:
    expression = scale_expression(rule["expr"], factor, shortest_range=4 * scrape_interval, step=scrape_interval)
    durations: dict[str, Any] = {key: _scaled(rule[key], factor) for key in ("for", "keep_firing_for") if key in rule}
    return {**rule, "expr": expression, **durations}


def _scaled(duration: str, factor: float, least: float = 0.0) -> str:
    return format_duration(round(max(parse_duration(str(duration)) / factor, least * 1_000)))
