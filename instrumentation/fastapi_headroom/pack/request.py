"""Requests: rate, errors and duration against the objectives, and where the time of requests goes."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, palette, panels, promql, slo
from fastapi_headroom.pack.board import Cell, Row, Variable, across
from fastapi_headroom.pack.panels import Column, Query
from fastapi_headroom.pack.rules import Rule

UID = "headroom-request"
_ERROR = 'outcome="error"'
_POOL_WAIT = 'stage="pool_wait"'
CRASHED = 'error_type!~"|[0-9]+"'
"""``error_type`` is the exception's class for one that nobody handled, and the status code for a plain 5xx."""


def _unhandled() -> str:
    errors = promql.by(
        "sum",
        ("job", "http_route", "error_type"),
        promql.rate(catalog.REQUEST_DURATION, "5m", CRASHED, suffix="_count"),
    )
    return f"{errors} > {promql.number(thresholds.UNHANDLED_RATE)}"


RULES = (
    Rule(
        name="UnhandledExceptions",
        expression=_unhandled(),
        severity="warning",
        pending="5m",
        summary="A route raises an exception that nothing handles.",
        description=(
            "{{ $labels.job }}: {{ $labels.http_route }} raised {{ $labels.error_type }} "
            "{{ $value | humanize }} times a second over the last 5 minutes."
        ),
        board=UID,
        variables=(("job", "job"), ("route", "http_route")),
    ),
)


_ROUTES = 'http_route=~"$route"'
_ROUTE = ("http_route",)
_STATUS = "http_response_status_code"


def latency(q: float, *matchers: str) -> str:
    """Return a quantile of the latency that clients felt."""
    return promql.shown_quantile(q, catalog.REQUEST_LATENCY, (), *matchers)


def latencies(*matchers: str) -> tuple[Query, ...]:
    """Return the quantiles that are shown together, and the objective."""
    quantiles = (Query(latency(q, *matchers), f"p{q * 100:.0f}", exemplar=q == 0.99) for q in (0.5, 0.95, 0.99))
    return (*quantiles, Query(f"vector({thresholds.LATENCY_THRESHOLD})", "objective"))


def requests(labels: tuple[str, ...], *matchers: str) -> str:
    """Return requests per second."""
    return promql.by("sum", labels, promql.flow(catalog.REQUESTS, *matchers))


def by_class(*matchers: str) -> str:
    """Return requests per second by class of status: 2xx, 3xx, 4xx, 5xx."""
    each = promql.by("sum", (_STATUS,), promql.flow(catalog.REQUEST_DURATION, *matchers, suffix="_count"))
    return f'sum by (class) (label_replace({each}, "class", "${{1}}xx", "{_STATUS}", "(.).."))'


def stages(*matchers: str) -> str:
    """Return the mean time of a request by stage of the wait ledger."""
    seconds = promql.by("sum", ("stage",), promql.flow(catalog.REQUEST_STAGE, *matchers))
    return f"{seconds} / on () group_left () {promql.by('sum', (), promql.flow(catalog.REQUESTS, *matchers))}"


def budget_left(ratio: str, budget: float) -> str:
    """Return the share of an error budget that is left: 1 untouched, 0 used up, negative overdrawn."""
    return f"1 - ({ratio}) / {promql.number(budget)}"


BUDGET: panels.Steps = ((None, palette.BAD), (0.0, palette.WARN), (0.25, palette.GOOD))


def _first_row() -> Row:
    errors = slo.error_ratio(promql.INTERVAL, *promql.BOARD, _ROUTES, labels=())
    slow = slo.slow_ratio(promql.INTERVAL, *promql.BOARD, _ROUTES, labels=())
    month_errors = slo.error_ratio("30d", *promql.BOARD, labels=())
    month_slow = slo.slow_ratio("30d", *promql.BOARD, labels=())
    milliseconds = f"{thresholds.LATENCY_THRESHOLD * 1000:.0f} ms"
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number("Requests", "How many requests per second are served?", "reqps", requests((), _ROUTES)),
            panels.number(
                "Errors",
                "What share of requests fails (5xx or an unhandled exception)?",
                "percentunit",
                errors,
                steps=((None, palette.GOOD), (slo.AVAILABILITY_BUDGET, palette.WARN), (0.01, palette.BAD)),
                decimals=2,
            ),
            panels.number(
                "Latency, p99",
                "How long does the slowest request of a hundred take, as its client felt it?",
                "s",
                latency(0.99, _ROUTES),
                steps=(
                    (None, palette.GOOD),
                    (thresholds.LATENCY_THRESHOLD, palette.WARN),
                    (2 * thresholds.LATENCY_THRESHOLD, palette.BAD),
                ),
            ),
            panels.number(
                f"Slower than {milliseconds}",
                "What share of requests misses the latency objective's threshold?",
                "percentunit",
                slow,
                steps=((None, palette.GOOD), (slo.LATENCY_BUDGET, palette.WARN), (0.05, palette.BAD)),
                decimals=2,
            ),
            panels.number(
                "Error budget left",
                (
                    f"How much of 30 days' error budget is left ({thresholds.AVAILABILITY_OBJECTIVE:.1%} objective, "
                    "all routes)? Below 0 the objective is missed."
                ),
                "percentunit",
                budget_left(month_errors, slo.AVAILABILITY_BUDGET),
                steps=BUDGET,
                decimals=0,
                spark=False,
            ),
            panels.number(
                "Latency budget left",
                (
                    f"How much of 30 days' latency budget is left ({thresholds.LATENCY_OBJECTIVE:.0%} within "
                    f"{milliseconds}, all routes)?"
                ),
                "percentunit",
                budget_left(month_slow, slo.LATENCY_BUDGET),
                steps=BUDGET,
                decimals=0,
                spark=False,
            ),
        ),
    )


def _burn(ratio: str, budget: float) -> str:
    return f"({ratio}) / {promql.number(budget)}"


def _objectives_row() -> Row:
    windows = ("5m", "1h", "6h", "1d")
    factors = ("14.4", "6", "1")
    colours = {
        "5m": palette.QUIET,
        "1h": palette.NEUTRAL,
        "6h": "purple",
        "1d": "yellow",
        "14.4": palette.BAD,
        "6": palette.WARN,
        "1": palette.GOOD,
    }

    def burn(title: str, what: str, queries: dict[str, str]) -> Cell:
        limits = (Query(f"vector({factor})", factor) for factor in factors)
        lines = (Query(expression, window) for window, expression in queries.items())
        question = (
            f"How fast is the {what} budget used up? At 1 it lasts exactly 30 days, at 14.4 two days. Two windows "
            "above a dashed line page."
        )
        return Cell(
            panels.lines(title, question, "short", *lines, *limits, colours=colours, limits=factors, decimals=1), 8, 8
        )

    errors = {
        window: _burn(slo.error_ratio(window, *promql.BOARD, labels=()), slo.AVAILABILITY_BUDGET) for window in windows
    }
    slow = {window: _burn(slo.slow_ratio(window, *promql.BOARD, labels=()), slo.LATENCY_BUDGET) for window in windows}
    return Row(
        "How long have we got?",
        (
            burn("Burn of the error budget, by window", "error", errors),
            burn("Burn of the latency budget, by window", "latency", slow),
            Cell(
                panels.lines(
                    "Within the objective, last hour",
                    (
                        "Which share of requests succeeded, and which was fast enough? The dashed lines are the "
                        "objectives."
                    ),
                    "percentunit",
                    Query(f"1 - ({slo.error_ratio('1h', *promql.BOARD, labels=())})", "available"),
                    Query(f"1 - ({slo.slow_ratio('1h', *promql.BOARD, labels=())})", "fast enough"),
                    Query(f"vector({thresholds.AVAILABILITY_OBJECTIVE})", "availability objective"),
                    Query(f"vector({thresholds.LATENCY_OBJECTIVE})", "latency objective"),
                    colours={
                        "available": palette.GOOD,
                        "fast enough": palette.NEUTRAL,
                        "availability objective": palette.BAD,
                        "latency objective": palette.WARN,
                    },
                    limits=("availability objective", "latency objective"),
                    minimum=None,
                    maximum=1,
                    zero=False,
                ),
                8,
                8,
            ),
        ),
    )


def _red_row() -> Row:
    return Row(
        "Rate, errors, duration",
        (
            *across(
                8,
                panels.lines(
                    "Requests by status",
                    "What do clients get? Red is ours to fix; blue is what clients asked wrongly.",
                    "reqps",
                    Query(by_class(_ROUTES), "{{class}}"),
                    colours=palette.STATUS,
                    stacked=True,
                ),
                panels.lines(
                    "Errors by route",
                    "Which routes fail?",
                    "reqps",
                    Query(
                        promql.or_zero(f"({promql.top(requests(_ROUTE, _ROUTES, _ERROR))} > 0)", "http_route"),
                        "{{http_route}}",
                    ),
                    legend="list",
                ),
                panels.lines(
                    "Latency",
                    "How long do requests take, as clients felt them? Exemplars lead to a trace.",
                    "s",
                    *latencies(_ROUTES),
                    colours=palette.QUANTILES,
                    limits=("objective",),
                ),
            ),
            *across(
                9,
                panels.lines(
                    "Where the time goes, per request",
                    (
                        "Is it our code (blue), the loop (red), the pool (orange), the database (purple) or the "
                        "cache (teal)? The height is the mean time of a request."
                    ),
                    "s",
                    Query(stages(_ROUTES), "{{stage}}"),
                    colours=palette.STAGES,
                    stacked=True,
                    legend="wide",
                ),
                panels.buckets(
                    "Latency, spread",
                    "Is there one kind of slow request or two? Two bands mean two paths, such as hit and miss.",
                    "s",
                    promql.by("sum", ("le",), promql.flow(catalog.REQUEST_LATENCY, _ROUTES, suffix="_bucket")),
                    exemplar=True,
                ),
            ),
        ),
    )


def _table_row() -> Row:
    def total(metric: catalog.Metric, *matchers: str, suffix: str = "") -> str:
        return promql.by("sum", _ROUTE, promql.total(metric, _ROUTES, *matchers, suffix=suffix))

    every = total(catalog.REQUESTS)
    seconds = total(catalog.REQUEST_DURATION, suffix="_sum")
    all_seconds = promql.by("sum", (), promql.total(catalog.REQUEST_DURATION, suffix="_sum"))
    slow = ((None, palette.GOOD), (thresholds.LATENCY_THRESHOLD, palette.BAD))
    quantiles = tuple(
        Column(
            f"p{q * 100:.0f}",
            promql.shown_quantile(q, catalog.REQUEST_LATENCY, _ROUTE, _ROUTES, window="$__range"),
            "s",
            steps=slow,
        )
        for q in (0.5, 0.95, 0.99)
    )
    queries = (
        f"{total(catalog.REQUEST_QUERIES, suffix='_sum')} / ({total(catalog.REQUEST_QUERIES, suffix='_count')} > 0)"
    )

    waited = promql.by("sum", _ROUTE, promql.total(catalog.REQUEST_STAGE, _ROUTES, _POOL_WAIT))

    def link(uid: str) -> str:
        return panels.board_link(uid, "&var-route=${__data.fields.Route}")

    return Row(
        "Which route?",
        (
            Cell(
                panels.listing(
                    "Routes in the time shown",
                    (
                        "Which route is worth tuning first? The share of time says where the app's time goes; a "
                        "click on a route shows it alone, with its stages. A p99 far above the p50 is a wait, or a "
                        "second kind of request; both high is the route's own work."
                    ),
                    {"http_route": "Route"},
                    Column("Requests", f"{every} > 0", "short"),
                    Column(
                        "Share of time", f"{seconds} / on () group_left () {all_seconds}", "percentunit", 1, bar=True
                    ),
                    *quantiles,
                    Column(
                        "Errors",
                        f"{total(catalog.REQUESTS, _ERROR)} / ({every} > 0)",
                        "percentunit",
                        2,
                        ((None, palette.GOOD), (slo.AVAILABILITY_BUDGET, palette.WARN), (0.01, palette.BAD)),
                    ),
                    Column(
                        "Pool wait",
                        f"({waited} or 0 * {every}) / ({every} > 0)",
                        "s",
                        link=link("headroom-pool"),
                    ),
                    Column(
                        "Loop hold p99",
                        promql.shown_quantile(0.99, catalog.LOOP_HOLD, _ROUTE, _ROUTES, window="$__range"),
                        "s",
                        link=link("headroom-loop"),
                    ),
                    Column("Queries", queries, "short", 1, link=link("headroom-pool")),
                    sort="Share of time",
                    links={"Route": link("headroom-request")},
                    widths={
                        "Requests": 110,
                        "p50": 90,
                        "p95": 90,
                        "p99": 90,
                        "Errors": 110,
                        "Pool wait": 120,
                        "Loop hold p99": 130,
                        "Queries": 100,
                    },
                ),
                24,
                10,
            ),
        ),
    )


def _outside_row() -> Row:
    host = ("server_address",)
    calls = promql.by("sum", host, promql.flow(catalog.HTTP_CLIENT_DURATION, suffix="_count"))
    failed = promql.by(
        "sum",
        ("server_address", "error_type"),
        promql.flow(catalog.HTTP_CLIENT_DURATION, 'error_type!=""', suffix="_count"),
    )
    return Row(
        "Which other service?",
        across(
            7,
            panels.lines(
                "Calls to other services",
                "How many HTTP calls does the app make, and to whom? It should rise with the requests, not faster.",
                "reqps",
                Query(promql.or_zero(promql.top(calls), "server_address"), "{{server_address}}"),
            ),
            panels.lines(
                "Failed calls",
                "Who answers with an error (a status), and who does not answer at all (the name of an exception)?",
                "reqps",
                Query(
                    promql.or_zero(f"({promql.top(failed)} > 0)", "server_address"),
                    "{{server_address}} {{error_type}}",
                ),
            ),
            panels.lines(
                "Duration of calls, p95",
                "Who is slow? Our requests wait as long: the stage http_client in where the time goes.",
                "s",
                Query(
                    promql.top(promql.shown_quantile(0.95, catalog.HTTP_CLIENT_DURATION, host)), "{{server_address}}"
                ),
            ),
        ),
    )


def _details_row() -> Row:
    crashes = promql.by(
        "sum", ("error_type",), promql.flow(catalog.REQUEST_DURATION, _ROUTES, CRASHED, suffix="_count")
    )
    gone = promql.by("sum", _ROUTE, promql.flow(catalog.REQUEST_DISCONNECTS, _ROUTES))
    active = promql.by("sum", ("http_request_method",), promql.shown(catalog.REQUESTS_ACTIVE))
    sockets = promql.by("sum", _ROUTE, promql.shown(catalog.WEBSOCKET_CONNECTIONS, _ROUTES))
    messages = promql.by("sum", ("direction",), promql.flow(catalog.WEBSOCKET_MESSAGES, _ROUTES))
    streams = promql.by("sum", ("kind",), promql.flow(catalog.STREAM_LIFETIME, _ROUTES, suffix="_count"))
    ends = promql.by("sum", ("reason",), promql.flow(catalog.WEBSOCKET_CLOSES, _ROUTES))
    plain = promql.by("sum", _ROUTE, promql.flow(catalog.COMPRESSIBLE_BYTES, _ROUTES))
    first_byte = promql.shown_quantile(0.95, catalog.TIME_TO_FIRST_BYTE, _ROUTE, _ROUTES)
    return Row(
        "Details",
        (
            *across(
                7,
                panels.lines(
                    "In flight",
                    "How many requests are being served at once? It rises with traffic times latency.",
                    "short",
                    Query(active, "{{http_request_method}}"),
                    stacked=True,
                    decimals=0,
                ),
                panels.lines(
                    "Unhandled exceptions by type",
                    "Which exceptions does nothing handle?",
                    "ops",
                    Query(promql.or_zero(f"({crashes} > 0)", "error_type"), "{{error_type}}"),
                ),
                panels.lines(
                    "Clients that went away",
                    "Which routes make clients give up before the response is complete?",
                    "reqps",
                    Query(promql.or_zero(f"({promql.top(gone)} > 0)", "http_route"), "{{http_route}}"),
                ),
                panels.lines(
                    "Time to first byte, p95",
                    "When does the first byte leave, streams included?",
                    "s",
                    Query(promql.top(first_byte), "{{http_route}}"),
                ),
            ),
            *across(
                7,
                panels.lines(
                    "Response bodies, p95",
                    "Which routes send much? Large bodies cost loop time, memory and the client's patience.",
                    "bytes",
                    Query(
                        promql.top(promql.shown_quantile(0.95, catalog.RESPONSE_BODY_SIZE, _ROUTE, _ROUTES)),
                        "{{http_route}}",
                    ),
                ),
                panels.lines(
                    "Request bodies, p95",
                    "Which routes receive much?",
                    "bytes",
                    Query(
                        promql.top(promql.shown_quantile(0.95, catalog.REQUEST_BODY_SIZE, _ROUTE, _ROUTES)),
                        "{{http_route}}",
                    ),
                ),
                panels.lines(
                    "Text sent uncompressed",
                    (
                        "How many bytes of text go out plain to clients that take compressed ones? A proxy in front "
                        "may compress them already; if none does, GZipMiddleware saves most of them."
                    ),
                    "Bps",
                    Query(promql.or_zero(f"({promql.top(plain)} > 0)", "http_route"), "{{http_route}}"),
                ),
            ),
            *across(
                7,
                panels.lines(
                    "Streams and WebSockets",
                    (
                        "How many WebSockets are open, and how many streams end per second? They are left out of the "
                        "latency above."
                    ),
                    "short",
                    Query(promql.or_zero(f"({sockets} > 0)", "http_route"), "open {{http_route}}"),
                    Query(promql.or_zero(streams, "kind"), "ended/s {{kind}}"),
                ),
                panels.lines(
                    "WebSocket messages",
                    "How many messages go in and out?",
                    "ops",
                    Query(promql.or_zero(messages, "direction"), "{{direction}}"),
                ),
                panels.lines(
                    "Ends of WebSockets",
                    (
                        "How do WebSockets end? Red is the app's own error, orange a connection that was cut off, blue "
                        "a client that was refused."
                    ),
                    "ops",
                    Query(promql.or_zero(ends, "reason"), "{{reason}}"),
                    colours=palette.CLOSES,
                    stacked=True,
                ),
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Requests and SLO",
        "Are requests fast and right, how long does the budget last, and which route is to blame?",
        (_first_row(), _objectives_row(), _red_row(), _table_row(), _outside_row(), _details_row()),
        (Variable("route", catalog.REQUESTS, "http_route", "Route"),),
    )
