"""Rules on workers that vanish, restart without end, grow without end, or accept no connections."""

from __future__ import annotations

from typing import Final

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import promql
from fastapi_headroom.pack.rules import INSTANCE, JOB, Rule

BOARD: Final = "headroom-runtime"
_INSTANCE: Final = ("job", "instance")


def _absent() -> str:
    # absent() would need the job's name written into it. A job whose targets are all down has `up` series still.
    ours = promql.by("count", ("job",), f"last_over_time({promql.series(catalog.SERIES)}[1d])")
    return f"{ours}\nunless on (job) count by (job) (up)"


def _restarting() -> str:
    restarts = promql.by("sum", _INSTANCE, promql.increase(catalog.WORKER_RESTARTS, "15m"))
    workers = promql.by("max", _INSTANCE, promql.highest(catalog.WORKERS, "15m", 'state="alive"'))
    return f"{restarts}\n> {promql.number(thresholds.RESTARTS_PER_WORKER)} * {workers}"


def _growing() -> str:
    def memory(offset: str = "") -> str:
        window = f"{promql.series(catalog.PROCESS_MEMORY)}[10m]{offset}"
        return promql.by("sum", _INSTANCE, f"avg_over_time({window})")

    now, half, hour = memory(), memory(" offset 30m"), memory(" offset 1h")
    # The lesser growth of two half hours: a cache that fills, or a deploy, is a step in one of them. Differences, and
    # not predict_linear, which counts in seconds: the time scale of these can be changed mechanically.
    slower = promql.block(f"{now} - {half}\n< {half} - {hour}\nor {half} - {hour}")
    forecast = promql.block(f"{now}\n+ {2 * thresholds.MEMORY_FORECAST_HOURS} * {slower}")
    limit = promql.by("max", _INSTANCE, promql.highest(catalog.PROCESS_MEMORY_LIMIT, "10m"))
    return f"{forecast}\n/ {limit}\n> 1"


def _backlog() -> str:
    waiting = promql.by("max", (*_INSTANCE, "port"), f"avg_over_time({promql.series(catalog.ACCEPT_BACKLOG)}[5m])")
    return f"{waiting} > {promql.number(thresholds.ACCEPT_BACKLOG)}"


RULES: Final = (
    Rule(
        name="TargetAbsent",
        expression=_absent(),
        severity="critical",
        pending="5m",
        summary="Prometheus has no target of the app any more.",
        description="{{ $labels.job }}: it was scraped within the last day, and now there is no target of this name.",
        board=BOARD,
        variables=JOB,
    ),
    Rule(
        name="WorkerRestarting",
        expression=_restarting(),
        severity="warning",
        summary="Workers end and are started anew, again and again.",
        description=(
            '{{ $labels.job }} ({{ $labels.instance }}): {{ $value | printf "%.0f" }} restarts of workers within '
            f"15 minutes, more than {promql.number(thresholds.RESTARTS_PER_WORKER)} of each."
        ),
        board=BOARD,
        variables=INSTANCE,
    ),
    Rule(
        name="MemoryGrowing",
        expression=_growing(),
        severity="warning",
        pending="30m",
        summary="The workers' memory grows steadily and will reach its limit.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): growing as in the last hour, the workers need "
            "{{ $value | humanizePercentage }} of the memory that they may use in "
            f"{thresholds.MEMORY_FORECAST_HOURS} hours."
        ),
        board=BOARD,
        variables=INSTANCE,
    ),
    Rule(
        name="AcceptBacklog",
        expression=_backlog(),
        severity="warning",
        pending="2m",
        summary="Connections wait because no worker accepts them.",
        description=(
            '{{ $labels.job }} ({{ $labels.instance }}, port {{ $labels.port }}): {{ $value | printf "%.0f" }} '
            "connections wait to be accepted, on average over 5 minutes."
        ),
        board=BOARD,
        variables=INSTANCE,
    ),
)
