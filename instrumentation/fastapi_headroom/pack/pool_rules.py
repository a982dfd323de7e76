"""When to wake somebody because of a database pool."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import promql
from fastapi_headroom.pack.pool_queries import POOL, STATE, UID, may_open
from fastapi_headroom.pack.rules import INSTANCE, Rule

LABELS = ("job", "instance", POOL)
LINK = (*INSTANCE, ("pool", POOL))


def _wait() -> str:
    checkouts = promql.by("sum", LABELS, promql.rate(catalog.POOL_WAIT, "5m", suffix="_count"))
    return (
        f"{promql.quantile(0.95, catalog.POOL_WAIT, '5m', LABELS)} > {promql.number(thresholds.POOL_WAIT_P95)}\n"
        f"and {checkouts} > {promql.number(thresholds.TRAFFIC_FLOOR)}"
    )


def _exhausted() -> str:
    used = promql.by("sum", LABELS, promql.highest(catalog.POOL_COUNT, "5m", f'{STATE}="used"'))
    limit = promql.by("sum", LABELS, promql.highest(catalog.POOL_MAX, "5m"))
    pending = promql.by("sum", LABELS, promql.highest(catalog.POOL_PENDING, "5m"))
    # A checkout waits only at the limit, so `pending` proves it also when one worker of several is there.
    at_limit = promql.block(f"{used} >= {limit}\nor {pending} > 0")
    return f"{promql.by('sum', LABELS, promql.increase(catalog.POOL_TIMEOUTS, '5m'))} > 0\nand {at_limit}"


def _held_idle() -> str:
    labels = (*LABELS, "http_route")
    idle = promql.by("sum", labels, promql.rate(catalog.POOL_IDLE_HOLD_BY_ROUTE, "5m"))
    limit = may_open(_highest)  # a pool that autosize keeps small is not held by a single connection
    share = promql.number(thresholds.POOL_IDLE_SHARE)
    return f"{idle}\n/ on ({', '.join(LABELS)}) group_left ()\n{limit}\n> {share}"


def _leaked() -> str:
    return f"{promql.by('sum', (*LABELS, 'http_route'), promql.highest(catalog.POOL_LEAKED, '5m'))} > 0"


def _repeated() -> str:
    labels = ("job", "instance", "http_route")
    found = promql.by("sum", labels, promql.rate(catalog.REPEATED_STATEMENTS, "5m"))
    return f"{found} > {promql.number(thresholds.REPEATED_RATE)}"


def _over_budget() -> str:
    pools = promql.by("sum", ("job", POOL), may_open(_highest))
    return f"{pools}\n> {promql.by('max', ('job', POOL), _highest(catalog.DATABASE_CONNECTIONS_MAX))}"


def _highest(metric: catalog.Metric) -> str:
    return promql.highest(metric, "5m")


RULES = (
    Rule(
        name="PoolWait",
        expression=_wait(),
        severity="warning",
        pending="2m",
        keep_firing="5m",
        summary="Requests wait for database connections.",
        description=(
            f"{{{{ $labels.job }}}} ({{{{ $labels.instance }}}}): one checkout in twenty from pool "
            f"{{{{ $labels.{POOL} }}}} waits {{{{ $value | humanizeDuration }}}} or longer."
        ),
        board=UID,
        variables=LINK,
    ),
    Rule(
        name="PoolExhausted",
        expression=_exhausted(),
        severity="critical",
        pending="1m",
        keep_firing="5m",
        summary="The database pool is at its limit and checkouts time out.",
        description=(
            f'{{{{ $labels.job }}}} ({{{{ $labels.instance }}}}): {{{{ $value | printf "%.0f" }}}} checkouts from pool '
            f"{{{{ $labels.{POOL} }}}} gave up within 5 minutes; each is a failed request."
        ),
        board=UID,
        variables=LINK,
    ),
    Rule(
        name="ConnectionsHeldIdle",
        expression=_held_idle(),
        severity="warning",
        pending="5m",
        summary="A route keeps database connections while it runs no statement.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): {{ $labels.http_route }} holds "
            f"{{{{ $value | humanizePercentage }}}} of pool {{{{ $labels.{POOL} }}}} without using it, say over a call "
            "to another service."
        ),
        board=UID,
        variables=LINK,
    ),
    Rule(
        name="ConnectionsLeaked",
        expression=_leaked(),
        severity="warning",
        pending="10m",
        summary="Sessions are left open: their connections never come back to the pool.",
        description=(
            f'{{{{ $labels.job }}}} ({{{{ $labels.instance }}}}): {{{{ $value | printf "%.0f" }}}} connections of pool '
            f"{{{{ $labels.{POOL} }}}} are held by {{{{ $labels.http_route }}}}, whose work has ended; the log names "
            "the line that took them."
        ),
        board=UID,
        variables=LINK,
    ),
    Rule(
        name="QueriesPerRequestHigh",
        expression=_repeated(),
        severity="warning",
        pending="5m",
        summary="Requests run the same statement again and again (N+1).",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): on {{ $labels.http_route }} one statement is run "
            f"{thresholds.REPEATED_STATEMENTS} times or more within a request, "
            '{{ $value | printf "%.2f" }} times per second; the log names the statement and the line.'
        ),
        board=UID,
        variables=INSTANCE,
    ),
    Rule(
        name="ConnectionBudgetExceeded",
        expression=_over_budget(),
        severity="warning",
        pending="10m",
        summary="The pools may open more connections than the database lets in.",
        description=(
            f'{{{{ $labels.job }}}}: all workers together may open {{{{ $value | printf "%.0f" }}}} connections '
            f"through pool {{{{ $labels.{POOL} }}}}, more than the database has. At full load connects will be refused."
        ),
        board=UID,
        variables=(("job", "job"), ("pool", POOL)),
    ),
)
