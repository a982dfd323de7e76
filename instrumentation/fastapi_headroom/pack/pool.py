"""Database pool: who waits for connections, who holds them, and how far the limit is."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, palette, panels, pool_autosize, pool_size, promql
from fastapi_headroom.pack.board import Cell, Row, Variable, across
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.rules import INSTANCE, Rule

UID = "headroom-pool"
POOL = "db_client_connection_pool_name"
STATE = "db_client_connection_state"
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
    # Under autosize the limit is small while little is asked for: what counts is how far it may grow.
    reach = promql.by("max", LABELS, promql.highest(catalog.POOL_AUTOSIZE_BUDGET, "5m"))
    limit = promql.block(f"{reach}\nor {promql.by('sum', LABELS, promql.highest(catalog.POOL_MAX, '5m'))}")
    share = promql.number(thresholds.POOL_IDLE_SHARE)
    return f"{idle}\n/ on ({', '.join(LABELS)}) group_left ()\n{limit}\n> {share}"


def _repeated() -> str:
    labels = ("job", "instance", "http_route")
    found = promql.by("sum", labels, promql.rate(catalog.REPEATED_STATEMENTS, "5m"))
    return f"{found} > {promql.number(thresholds.REPEATED_RATE)}"


def _over_budget() -> str:
    pools = promql.by("sum", ("job", POOL), promql.highest(catalog.POOL_MAX, "5m"))
    return f"{pools}\n> {promql.by('max', ('job', POOL), promql.highest(catalog.DATABASE_CONNECTIONS_MAX, '5m'))}"


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


_POOLS = f'{POOL}=~"$pool"'
_PER_POOL = (POOL,)
_NAME = f"{{{{{POOL}}}}}"


def _used_share() -> str:
    used = promql.by("sum", _PER_POOL, promql.shown(catalog.POOL_COUNT, _POOLS, f'{STATE}="used"'))
    return f"{used} / {promql.by('sum', _PER_POOL, promql.shown(catalog.POOL_MAX, _POOLS))}"


def _summed(metric: catalog.Metric, *matchers: str) -> str:
    return promql.by("sum", (), promql.shown(metric, _POOLS, *matchers))


def _by_route(metric: catalog.Metric) -> str:
    return promql.top(promql.by("sum", ("http_route",), promql.flow(metric, _POOLS)))


def _first_row() -> Row:
    share: panels.Steps = ((None, palette.GOOD), (0.8, palette.WARN), (0.95, palette.BAD))
    wait: panels.Steps = (
        (None, palette.GOOD),
        (thresholds.POOL_WAIT_P95 / 2, palette.WARN),
        (thresholds.POOL_WAIT_P95, palette.BAD),
    )
    rate_of = promql.by("sum", (), promql.flow(catalog.POOL_TIMEOUTS, _POOLS))
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Used of the limit",
                "How much of the fullest pool's limit is in use? At 100 % checkouts wait.",
                "percentunit",
                f"max({_used_share()})",
                steps=share,
                decimals=0,
            ),
            panels.number(
                "Waiting now",
                (
                    "How many checkouts wait for a connection right now? Anything but short spikes means that "
                    "requests queue for the database."
                ),
                "short",
                _summed(catalog.POOL_PENDING),
                steps=((None, palette.GOOD), (1, palette.WARN), (10, palette.BAD)),
                decimals=0,
            ),
            panels.number(
                "Wait, p95",
                (
                    f"How long does one checkout in twenty wait at least? Over {thresholds.POOL_WAIT_P95 * 1000:.0f} "
                    "ms an alert fires."
                ),
                "s",
                promql.shown_quantile(0.95, catalog.POOL_WAIT, (), _POOLS),
                steps=wait,
            ),
            panels.number(
                "Time-outs",
                "How many checkouts per second give up? Each is a failed request.",
                "ops",
                rate_of,
                steps=panels.ZERO_IS_GOOD,
            ),
            panels.number(
                "Held, p99",
                (
                    "How long does a request keep its connection in the slowest one of a hundred? Long holds are "
                    "what fills a pool."
                ),
                "s",
                promql.shown_quantile(0.99, catalog.POOL_USE, (), _POOLS),
                steps=((None, palette.GOOD), (5, palette.WARN), (30, palette.BAD)),
            ),
            panels.number(
                "Open connections",
                (
                    "How many connections do all workers have open together? The database's max_connections must "
                    "hold them and everybody else's."
                ),
                "short",
                promql.by("sum", (), promql.shown(catalog.POOL_COUNT, _POOLS)),
                decimals=0,
            ),
        ),
    )


def _limits_row() -> Row:
    return Row(
        "Is the pool full, and who pays for it?",
        (
            Cell(
                panels.lines(
                    "Connections against the limit",
                    (
                        "How near is the pool to its limit? Used that touches the dashed line means that checkouts "
                        "wait; overflow above the size means that connections are opened and thrown away."
                    ),
                    "short",
                    Query(_summed(catalog.POOL_COUNT, f'{STATE}="used"'), "used"),
                    Query(_summed(catalog.POOL_COUNT, f'{STATE}="idle"'), "idle"),
                    Query(_summed(catalog.POOL_MAX), "limit"),
                    Query(_summed(catalog.POOL_IDLE_MAX), "size"),
                    Query(_summed(catalog.POOL_OVERFLOW), "overflow"),
                    colours={
                        "used": palette.NEUTRAL,
                        "idle": palette.QUIET,
                        "overflow": palette.WARN,
                        "size": "yellow",
                    },
                    stacked=True,
                    limits=("limit", "size", "overflow"),
                    decimals=0,
                ),
                12,
                9,
            ),
            Cell(
                panels.lines(
                    "Wait for a connection",
                    (
                        "How long do checkouts wait? A rising p50 means that everybody waits, a rising p99 alone "
                        "that bursts do."
                    ),
                    "s",
                    *(
                        Query(
                            promql.shown_quantile(q, catalog.POOL_WAIT, (), _POOLS),
                            f"p{q * 100:.0f}",
                            exemplar=q == 0.99,
                        )
                        for q in (0.5, 0.95, 0.99)
                    ),
                    Query(f"vector({promql.number(thresholds.POOL_WAIT_P95)})", "p95 limit"),
                    colours=palette.QUANTILES,
                    limits=("p95 limit",),
                ),
                6,
                9,
            ),
            Cell(
                panels.lines(
                    "Waiting and timing out",
                    "Does the queue for connections drain, or do requests give up? Time-outs mean lost requests.",
                    "short",
                    Query(promql.by("sum", _PER_POOL, promql.shown(catalog.POOL_PENDING, _POOLS)), f"waiting {_NAME}"),
                    Query(
                        promql.by("sum", _PER_POOL, promql.flow(catalog.POOL_TIMEOUTS, _POOLS)), f"time-outs/s {_NAME}"
                    ),
                ),
                6,
                9,
            ),
        ),
    )


def _routes_row() -> Row:
    return Row(
        "Who waits, who holds",
        across(
            11,
            panels.lines(
                "Victims: requests waiting, by route",
                "Which routes wait for connections? The value is how many of their requests wait on average.",
                "short",
                Query(_by_route(catalog.POOL_WAIT_BY_ROUTE), "{{http_route}}"),
                legend="table",
            ),
            panels.lines(
                "Culprits: connections held, by route",
                (
                    "Which routes keep the pool busy? The value is how many connections each holds on average: "
                    "shorten the highest first."
                ),
                "short",
                Query(_by_route(catalog.POOL_HOLD_BY_ROUTE), "{{http_route}}"),
                legend="table",
            ),
            panels.lines(
                "Held but idle, by route",
                (
                    "Which routes hold a connection while no statement runs on it, say during a call to another "
                    "service? That is capacity for nothing."
                ),
                "short",
                Query(_by_route(catalog.POOL_IDLE_HOLD_BY_ROUTE), "{{http_route}}"),
                legend="table",
            ),
        ),
    )


def _habits_row() -> Row:
    return Row(
        "Which code is it? The log names the line",
        across(
            8,
            panels.lines(
                "Held for long, by route",
                (
                    "Which routes keep a connection beyond the threshold, or never give it back? The log has a record "
                    "of each place: where it was checked out, and where its holder stands."
                ),
                "ops",
                Query(_by_route(catalog.POOL_LONG_HOLDS), "{{http_route}}"),
                legend="table",
            ),
            panels.lines(
                "Repeated statements (N+1), by route",
                (
                    f"In which routes does one request run one statement {thresholds.REPEATED_STATEMENTS} times or "
                    "more? The log has the statement's shape and the line that runs it."
                ),
                "ops",
                Query(
                    promql.top(promql.by("sum", ("http_route",), promql.flow(catalog.REPEATED_STATEMENTS))),
                    "{{http_route}}",
                ),
                legend="table",
            ),
        ),
    )


def _details_row() -> Row:
    operation = "db_operation_name"
    return Row(
        "Details",
        (
            *across(
                8,
                panels.buckets(
                    "Wait, spread",
                    "Does everybody wait a little, or few for long? Two bands mean two kinds of requests.",
                    "s",
                    promql.by("sum", ("le",), promql.flow(catalog.POOL_WAIT, _POOLS, suffix="_bucket")),
                ),
                panels.lines(
                    "Hold time",
                    (
                        "How long do requests keep a connection? By Little's law, checkouts per second times this is "
                        "the connections needed."
                    ),
                    "s",
                    *(
                        Query(promql.shown_quantile(q, catalog.POOL_USE, (), _POOLS), f"p{q * 100:.0f}")
                        for q in (0.5, 0.95, 0.99)
                    ),
                    colours=palette.QUANTILES,
                ),
                panels.lines(
                    "Opened and thrown away",
                    (
                        "Are connections opened all the time? Steady churn costs each such request the connect time: "
                        "raise the pool's size rather than its overflow."
                    ),
                    "ops",
                    Query(
                        promql.by("sum", _PER_POOL, promql.flow(catalog.POOL_CREATE, _POOLS, suffix="_count")),
                        f"opened {_NAME}",
                    ),
                    Query(
                        promql.by("sum", _PER_POOL, promql.flow(catalog.POOL_INVALIDATIONS, _POOLS)),
                        f"invalidated {_NAME}",
                    ),
                ),
            ),
            *across(
                8,
                panels.lines(
                    "Statements, p95 by operation",
                    (
                        "Is the database itself slow? If this rises while waits are flat, look at the database, not "
                        "at the pool."
                    ),
                    "s",
                    Query(
                        promql.shown_quantile(0.95, catalog.DB_OPERATION_DURATION, (operation,)), f"{{{{{operation}}}}}"
                    ),
                ),
                panels.lines(
                    "Statements per second",
                    "What load does the app put on the database?",
                    "ops",
                    Query(
                        promql.by("sum", (operation,), promql.flow(catalog.DB_OPERATION_DURATION, suffix="_count")),
                        f"{{{{{operation}}}}}",
                    ),
                    stacked=True,
                ),
                panels.lines(
                    "Statements per request, by route",
                    "Does a route run one query per row (N+1)? Means over ten deserve a look.",
                    "short",
                    Query(promql.top(promql.mean(catalog.REQUEST_QUERIES, ("http_route",))), "{{http_route}}"),
                    legend="table",
                    decimals=1,
                ),
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Database pool",
        "Do requests wait for database connections, who holds them, and is it the pool or the database?",
        (
            _first_row(),
            _limits_row(),
            pool_size.row(),
            pool_autosize.row(),
            _routes_row(),
            _habits_row(),
            _details_row(),
        ),
        (Variable("pool", catalog.POOL_MAX, POOL, "Pool"),),
    )
