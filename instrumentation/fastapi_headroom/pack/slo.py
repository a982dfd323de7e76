"""Objectives: burn-rate alerts on availability and latency, after the SRE workbook's multi-window method.

An error budget is what the objective leaves over: 0.1 % of requests at 99.9 %. A burn rate of 1 spends it
exactly over the objective's period (30 days). The long window says that it matters, the short one that it
still goes on, so the alert ends soon after the cause does.
"""

from __future__ import annotations

from typing import cast

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import promql
from fastapi_headroom.pack.rules import Rule, Severity

AVAILABILITY_BUDGET = round(1 - thresholds.AVAILABILITY_OBJECTIVE, 9)
LATENCY_BUDGET = round(1 - thresholds.LATENCY_OBJECTIVE, 9)
LATENCY_BOUND = f'le="{promql.number(thresholds.LATENCY_THRESHOLD)}"'
BOARD = "headroom-request"


def error_ratio(window: str, *matchers: str, labels: tuple[str, ...] = ("job",)) -> str:
    """Return the share of requests that ended in an error."""
    errors = promql.by("sum", labels, promql.rate(catalog.REQUESTS, window, *matchers, 'outcome="error"'))
    return promql.ratio(errors, promql.by("sum", labels, promql.rate(catalog.REQUESTS, window, *matchers)))


def slow_ratio(window: str, *matchers: str, labels: tuple[str, ...] = ("job",)) -> str:
    """Return the share of requests slower than the objective's threshold, as their clients felt them."""
    row = catalog.REQUEST_LATENCY
    fast = promql.by("sum", labels, promql.rate(row, window, *matchers, LATENCY_BOUND, suffix="_bucket"))
    every = promql.by("sum", labels, promql.rate(row, window, *matchers, suffix="_count"))
    return f"1 - {promql.ratio(fast, every)}"


def _both(long: str, short: str, limit: str, floor: str) -> str:
    busy = f"{floor} > {promql.number(thresholds.TRAFFIC_FLOOR)}"
    return f"{promql.block(long)} > {limit}\nand {promql.block(short)} > {limit}\nand {busy}"


def _error_burn(long: str, short: str, factor: float) -> str:
    floor = promql.by("sum", ("job",), promql.rate(catalog.REQUESTS, long))
    limit = f"{promql.number(factor)} * {promql.number(AVAILABILITY_BUDGET)}"
    return _both(error_ratio(long), error_ratio(short), limit, floor)


def _latency_burn(long: str, short: str, factor: float) -> str:
    floor = promql.by("sum", ("job",), promql.rate(catalog.REQUEST_LATENCY, long, suffix="_count"))
    limit = f"{promql.number(factor)} * {promql.number(LATENCY_BUDGET)}"
    return _both(slow_ratio(long), slow_ratio(short), limit, floor)


_SLOW = f"slower than {thresholds.LATENCY_THRESHOLD * 1000:.0f} ms"


def _description(what: str, long: str, short: str, factor: float, budget: float) -> str:
    return (
        f"{{{{ $labels.job }}}}: {{{{ $value | humanizePercentage }}}} of requests {what} over {long}, and it goes on "
        f"over {short}; the objective allows {promql.number(budget * 100)}% (burn rate over {promql.number(factor)})."
    )


RULES = (
    *(
        Rule(
            name="ErrorBudgetBurn",
            expression=_error_burn(long, short, factor),
            severity=cast(Severity, severity),
            pending=pending,
            labels={"window": long},
            summary="Requests fail often enough to use up the error budget.",
            description=_description("failed", long, short, factor, AVAILABILITY_BUDGET),
            board=BOARD,
        )
        for long, short, factor, pending, severity in thresholds.BURN_WINDOWS
    ),
    *(
        Rule(
            name="LatencyBudgetBurn",
            expression=_latency_burn(long, short, factor),
            severity=cast(Severity, severity),
            pending=pending,
            labels={"window": long},
            summary="Requests are slow often enough to use up the latency budget.",
            description=_description(f"were {_SLOW}", long, short, factor, LATENCY_BUDGET),
            board=BOARD,
        )
        for long, short, factor, pending, severity in thresholds.BURN_WINDOWS[:2]
    ),
)
