"""Small building blocks of PromQL, so that every query is made of catalog rows and checked labels.

Boards and rules never spell a metric's name: they pass the row of the catalog, and a matcher on a
label that the row does not have is an error when the pack is built, not an empty panel at night.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from fastapi_headroom.catalog import Metric

TARGET_LABELS = ("job", "instance")
"""Labels that Prometheus adds to every series of a target."""
BOARD = ('job=~"$job"', 'instance=~"$instance"')
"""Matchers that every query on a board carries."""
INTERVAL = "$__rate_interval"

_MATCHER = re.compile(r'^([a-z_]+)(=|!=|=~|!~)".*"$')


def number(value: float) -> str:
    """Return a number as people write it: no trailing zeros, no rounding noise."""
    return f"{round(value, 9):.10g}"


def series(metric: Metric, *matchers: str, suffix: str = "") -> str:
    """Return the selector of a row; ``suffix`` is ``_bucket``, ``_sum`` or ``_count`` for histograms.

    Raises ValueError when a matcher names a label that the row does not carry, or the suffix does not
    fit the row's kind.
    """
    if (metric.kind == "histogram") != (suffix in ("_bucket", "_sum", "_count")):
        raise ValueError(f"{metric.name} is a {metric.kind}: suffix {suffix!r} does not fit")
    allowed = {*metric.labels, *TARGET_LABELS} | ({"le"} if suffix == "_bucket" else set())
    for matcher in matchers:
        found = _MATCHER.match(matcher)
        if found is None or found[1] not in allowed:
            raise ValueError(f"{metric.name} has no label for the matcher {matcher}")
    return f"{metric.name}{suffix}" + (f"{{{', '.join(matchers)}}}" if matchers else "")


def rate(metric: Metric, window: str, *matchers: str, suffix: str = "", offset: str = "") -> str:
    """Return the per-second rate of a counter, or of one part of a histogram."""
    return f"rate({series(metric, *matchers, suffix=suffix)}[{window}]{f' offset {offset}' if offset else ''})"


def increase(metric: Metric, window: str, *matchers: str, suffix: str = "") -> str:
    """Return how much a counter grew within the window."""
    return f"increase({series(metric, *matchers, suffix=suffix)}[{window}])"


def highest(metric: Metric, window: str, *matchers: str) -> str:
    """Return a gauge's highest value within the window, so that one lost scrape resets nothing."""
    return f"max_over_time({series(metric, *matchers)}[{window}])"


def by(operator: str, labels: Iterable[str], expression: str) -> str:
    """Return an aggregation: ``sum by (job) (...)``; without labels ``sum(...)``."""
    names = ", ".join(labels)
    return f"{operator} by ({names}) ({expression})" if names else f"{operator}({expression})"


def quantile(q: float, metric: Metric, window: str, labels: Iterable[str], *matchers: str) -> str:
    """Return a quantile of a histogram's observations within the window, per set of labels."""
    buckets = by("sum", (*labels, "le"), rate(metric, window, *matchers, suffix="_bucket"))
    return f"histogram_quantile({number(q)}, {buckets})"


def ratio(part: str, whole: str) -> str:
    """Return part / whole, where a part without series counts as 0 as long as there is a whole."""
    return block(f"{part}\nor 0 * {whole}") + f" / {whole}"


def block(expression: str) -> str:
    """Return the expression in parentheses, on indented lines of its own."""
    return "(\n" + textwrap.indent(expression, "  ") + "\n)"


def shown(metric: Metric, *matchers: str) -> str:
    """Return a gauge's series on a board."""
    return series(metric, *BOARD, *matchers)


def flow(metric: Metric, *matchers: str, suffix: str = "") -> str:
    """Return a counter's rate on a board, over the interval that suits the scrape."""
    return rate(metric, INTERVAL, *BOARD, *matchers, suffix=suffix)


def total(metric: Metric, *matchers: str, suffix: str = "") -> str:
    """Return how much a counter grew in the time that the board shows."""
    return increase(metric, "$__range", *BOARD, *matchers, suffix=suffix)


def shown_quantile(q: float, metric: Metric, labels: Iterable[str], *matchers: str, window: str = INTERVAL) -> str:
    """Return a histogram's quantile on a board."""
    return quantile(q, metric, window, labels, *BOARD, *matchers)


def mean(metric: Metric, labels: tuple[str, ...], *matchers: str) -> str:
    """Return the mean of a histogram's observations on a board."""
    parts = (by("sum", labels, flow(metric, *matchers, suffix=suffix)) for suffix in ("_sum", "_count"))
    return " / ".join(parts)


def or_zero(expression: str, label: str = "") -> str:
    """Return the expression, or 0 where it has no series, so that a true 0 is drawn as 0.

    With ``label`` the zero is a series whose label says ``none``, for legends that show that label.
    """
    zero = f'label_replace(vector(0), "{label}", "none", "", "")' if label else "vector(0)"
    return f"{expression} or on () {zero}"


def top(expression: str, keep: int = 8) -> str:
    """Return the series of an expression that are highest over the time shown.

    A plain ``topk`` chooses anew at every step, so that dozens of series flicker through a panel.
    """
    over_all = expression.replace(f"[{INTERVAL}]", "[$__range] @ end()")
    return f"{expression} and topk({keep}, {over_all})"
