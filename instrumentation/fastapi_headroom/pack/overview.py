"""Overview: what gives way first, is it bad now, and where does the time go?"""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import (
    board,
    cache,
    cache_queries,
    loop,
    palette,
    panels,
    pool,
    promql,
    queue,
    request,
    runtime,
    slo,
)
from fastapi_headroom.pack.board import Cell, Row, across
from fastapi_headroom.pack.panels import Column, Query

UID = "headroom-overview"
_FIRING = 'ALERTS{alertname=~"Headroom.+", alertname!="HeadroomWatchdog", alertstate="firing", job=~"$job"}'
_LEFT: panels.Steps = ((None, palette.BAD), (thresholds.REMAINING_LOW, palette.WARN), (0.3, palette.GOOD))
_RESOURCE = "{{resource}} {{name}}"


def _left() -> str:
    return promql.by("min", ("resource", "name"), promql.shown(catalog.REMAINING))


def _workers(state: str) -> str:
    return promql.by("sum", (), promql.shown(catalog.WORKERS, f'state="{state}"'))


def _first_row() -> Row:
    errors = slo.error_ratio(promql.INTERVAL, *promql.BOARD, labels=())
    month = slo.error_ratio("30d", *promql.BOARD, labels=())
    limit = thresholds.LATENCY_THRESHOLD
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Alerts",
                "How many alerts fire now? They are listed below.",
                "short",
                promql.or_zero(f"count({_FIRING})"),
                steps=((None, palette.GOOD), (1, palette.BAD)),
                decimals=0,
                spark=False,
            ),
            panels.number(
                "Tightest",
                "How much is left of the resource that gives way first? 0 % is exhausted.",
                "percentunit",
                f"min({_left()})",
                steps=_LEFT,
                decimals=0,
            ),
            panels.number(
                "Requests", "How many requests per second are served?", "reqps", request.requests(()), board=request.UID
            ),
            panels.number(
                "Errors",
                "What share of requests fails (5xx or an unhandled exception)?",
                "percentunit",
                errors,
                steps=((None, palette.GOOD), (slo.AVAILABILITY_BUDGET, palette.WARN), (0.01, palette.BAD)),
                decimals=2,
                board=request.UID,
            ),
            panels.number(
                "p99 latency",
                "How long does the slowest request of a hundred take, as its client felt it?",
                "s",
                request.latency(0.99),
                steps=((None, palette.GOOD), (limit, palette.WARN), (2 * limit, palette.BAD)),
                board=request.UID,
            ),
            panels.number(
                "Error budget",
                (
                    f"How much of 30 days' error budget is left ({thresholds.AVAILABILITY_OBJECTIVE:.1%} objective)? "
                    "Below 0 the objective is missed."
                ),
                "percentunit",
                request.budget_left(month, slo.AVAILABILITY_BUDGET),
                steps=request.BUDGET,
                decimals=0,
                spark=False,
                board=request.UID,
            ),
            panels.number(
                "In flight",
                "How many requests are being served at once?",
                "short",
                promql.by("sum", (), promql.shown(catalog.REQUESTS_ACTIVE)),
                decimals=0,
                board=request.UID,
            ),
            panels.number(
                "Workers",
                "How many workers serve?",
                "short",
                _workers("alive"),
                steps=((None, palette.BAD), (1, palette.GOOD)),
                decimals=0,
                board=runtime.UID,
            ),
        ),
    )


def _headroom_row() -> Row:
    named = f'label_replace({_FIRING}, "alert", "$1", "alertname", "Headroom(.+)")'
    # A row that says so, instead of a panel that says "No data".
    quiet = f'label_replace(label_replace(vector(0), "alert", "nothing fires", "", ""), "board", "{UID}", "", "")'
    alerts = panels.listing(
        "Firing alerts",
        "What fires now? A click on an alert opens the board that explains it.",
        {"severity": "Severity", "alert": "Alert", "instance": "Instance", "board": "Board"},
        Column("Firing", f"group by (severity, alert, instance, board) ({named}) or on () {quiet}", "short"),
        sort="Severity",
        rising=True,  # critical, info, warning: the alphabet is nearly right
        links={"Alert": panels.board_link("${__data.fields.Board}")},
        hidden=("Board", "Firing"),
        widths={"Severity": 90, "Instance": 140},
        colours={"Severity": {"critical": palette.BAD, "warning": palette.WARN, "info": palette.NEUTRAL}},
    )
    return Row(
        "What gives way first?",
        (
            Cell(
                panels.bars(
                    "Headroom left",
                    (
                        "How much of each limit is left, tightest first? What is at the top gives way first when "
                        "traffic grows."
                    ),
                    "percentunit",
                    Query(f"sort({_left()})", _RESOURCE),
                    steps=_LEFT,
                    maximum=1,
                ),
                8,
                9,
            ),
            Cell(
                panels.lines(
                    "Headroom left over time",
                    (
                        "Which limit comes closer? A line that falls with traffic is a limit to raise; one that "
                        "falls without is a leak."
                    ),
                    "percentunit",
                    Query(_left(), _RESOURCE),
                    Query(f"vector({promql.number(thresholds.REMAINING_LOW)})", "low"),
                    limits=("low",),
                    maximum=1,
                ),
                8,
                9,
            ),
            Cell(alerts, 8, 9),
        ),
    )


def _time_row() -> Row:
    return Row(
        "Where does the time go?",
        (
            Cell(
                panels.lines(
                    "Where the time goes, per request",
                    (
                        "Is it our code (blue), the loop (red), the pool (orange), the database (purple) or the "
                        "cache (teal)? The height is the mean time of a request; warm colours are waits for "
                        "something that ran out."
                    ),
                    "s",
                    Query(request.stages(), "{{stage}}"),
                    colours=palette.STAGES,
                    stacked=True,
                    legend="wide",
                    board=request.UID,
                ),
                12,
                9,
            ),
            Cell(
                panels.lines(
                    "Latency",
                    "Are requests fast enough? The dashed line is the objective; exemplars lead to a trace.",
                    "s",
                    *request.latencies(),
                    colours=palette.QUANTILES,
                    limits=("objective",),
                    board=request.UID,
                ),
                6,
                9,
            ),
            Cell(
                panels.lines(
                    "Requests by outcome",
                    "What do clients get? Red is ours to fix; blue is what clients asked wrongly.",
                    "reqps",
                    Query(request.requests(("outcome",)), "{{outcome}}"),
                    colours=palette.OUTCOMES,
                    stacked=True,
                    board=request.UID,
                ),
                6,
                9,
            ),
        ),
    )


def _signals_row() -> Row:
    used = promql.by("sum", (pool.POOL,), promql.shown(catalog.POOL_COUNT, f'{pool.STATE}="used"'))
    share = f"{used} / {promql.by('sum', (pool.POOL,), promql.shown(catalog.POOL_MAX))}"
    name = f"{{{{{pool.POOL}}}}}"
    ratio = cache_queries.served_ratio(("cache",))
    age = promql.by("max", (queue.QUEUE,), promql.shown(catalog.QUEUE_OLDEST_AGE))
    delay = promql.shown_quantile(0.99, catalog.LOOP_DELAY, ("instance", "worker"))
    memory = promql.by("sum", ("instance",), promql.shown(catalog.PROCESS_MEMORY))
    wait = promql.shown_quantile(0.95, catalog.POOL_WAIT, (pool.POOL,))
    return Row(
        "The signals, each with its own board",
        across(
            7,
            panels.lines(
                "Pool: used of the limit",
                "How full are the pools? At 100 % checkouts wait.",
                "percentunit",
                Query(share, name),
                maximum=1,
                board=pool.UID,
            ),
            panels.lines(
                "Pool: wait, p95", "Do requests wait for connections?", "s", Query(wait, name), board=pool.UID
            ),
            panels.lines(
                "Cache: hit ratio",
                "Does the cache take the load? Caches of servers; those in the process are on the board.",
                "percentunit",
                Query(ratio, "{{cache}}"),
                maximum=1,
                board=cache.UID,
            ),
            panels.lines(
                "Event loop: delay, p99",
                "Is the loop late?",
                "s",
                Query(delay, "{{instance}} / {{worker}}"),
                board=loop.UID,
            ),
            panels.lines(
                "Queues: oldest job",
                "Do jobs start in time?",
                "s",
                Query(age, f"{{{{{queue.QUEUE}}}}}"),
                board=queue.UID,
            ),
            panels.lines("Memory", "Does memory grow?", "bytes", Query(memory, "{{instance}}"), board=runtime.UID),
        ),
    )


def _versions_row() -> Row:
    labels = ("job", "service_name", "service_version", "python", "fastapi", "headroom")
    names = ("Job", "Service", "Version", "Python", "FastAPI", "fastapi-headroom")
    return Row(
        "What runs",
        (
            Cell(
                panels.listing(
                    "Versions now",
                    (
                        "Which version of the service runs where? Two versions of one service at once are a deploy "
                        "in progress."
                    ),
                    dict(zip(labels, names, strict=True)),
                    Column("Instances", promql.by("count", labels, promql.shown(catalog.APP_INFO)), "short", 0),
                ),
                24,
                4,
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Overview",
        "How much is left before the app falls over, what gives way first, and whose fault is it?",
        (_first_row(), _headroom_row(), _time_row(), _signals_row(), _versions_row()),
    )
