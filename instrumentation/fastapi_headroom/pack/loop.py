"""Event loop: how late it runs, and which code held it."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, palette, panels, promql
from fastapi_headroom.pack.board import Cell, Row, across
from fastapi_headroom.pack.panels import Column, Query
from fastapi_headroom.pack.rules import INSTANCE, WORKER, Rule, Severity

UID = "headroom-loop"
WORKERS = ("job", "instance", "worker")


def _lag(limit: float, severity: Severity) -> Rule:
    return Rule(
        name="EventLoopLag",
        expression=f"{promql.quantile(0.99, catalog.LOOP_DELAY, '5m', WORKERS)} > {promql.number(limit)}",
        severity=severity,
        pending="2m",
        keep_firing="5m",
        summary="The event loop runs late: every request of the worker waits.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}, worker {{ $labels.worker }}): the event loop is "
            "{{ $value | humanizeDuration }} late at the 99th percentile."
        ),
        board=UID,
        variables=WORKER,
    )


def _blocked() -> str:
    # A starved loop got no CPU: no code of the app held it, so no site is to blame.
    blocked = promql.series(catalog.LOOP_BLOCKED, 'cause!="starved"')
    seconds = promql.rate(catalog.LOOP_BLOCKED, "5m", 'cause!="starved"')
    # A site has no series before its first block, which is no increase to rate(): what a series began with counts,
    # too, where the process was measured before. Else an app that is new to Prometheus would bring its whole past.
    known = f"{promql.series(catalog.LOOP_DELAY, suffix='_count')} offset 5m"
    first = f"((min_over_time({blocked}[5m]) unless {blocked} offset 5m) and on (job, instance) {known}) / 300"
    both = f'{seconds} or label_replace({first}, "first", "yes", "", "")'
    labels = ("job", "instance", "site", "cause")
    return f"{promql.by('sum', labels, both)} > {promql.number(thresholds.LOOP_BLOCKED_SHARE)}"


def _saturated() -> str:
    mean = promql.by("max", WORKERS, f"avg_over_time({promql.series(catalog.LOOP_UTILIZATION)}[5m])")
    return f"{mean} > {promql.number(thresholds.LOOP_SATURATED)}"


def _threads_short() -> str:
    waiting = promql.series(catalog.THREADPOOL_TOKENS, 'state="waiting"')
    mean = promql.by("sum", ("job", "instance"), f"avg_over_time({waiting}[5m])")
    return f"{mean} > {promql.number(thresholds.THREADS_WAITING)}"


RULES = (
    _lag(thresholds.LOOP_LAG_WARNING, "warning"),
    _lag(thresholds.LOOP_LAG_CRITICAL, "critical"),
    Rule(
        name="EventLoopBlocked",
        expression=_blocked(),
        severity="warning",
        pending="2m",
        summary="One place in the code blocks the event loop.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): {{ $labels.site }} held the event loop "
            "{{ $value | humanizePercentage }} of the time ({{ $labels.cause }})."
        ),
        board=UID,
        variables=INSTANCE,
    ),
    Rule(
        name="LoopSaturated",
        expression=_saturated(),
        severity="warning",
        pending="10m",
        summary="An event loop has no time left for more requests.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}, worker {{ $labels.worker }}): the event loop is held "
            "{{ $value | humanizePercentage }} of the time."
        ),
        board=UID,
        variables=WORKER,
    ),
    Rule(
        name="ThreadpoolSaturated",
        expression=_threads_short(),
        severity="warning",
        pending="5m",
        summary="Sync endpoints and dependencies queue for a thread.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): {{ $value | humanize }} tasks wait for a thread of the "
            "threadpool on average."
        ),
        board=UID,
        variables=INSTANCE,
    ),
)


_WORKERS = 'worker=~"$worker"'
_NAME = "{{instance}} / {{worker}}"


def _per_worker(metric: catalog.Metric) -> str:
    return promql.by("max", ("instance", "worker"), promql.shown(metric, _WORKERS))


def _threads(state: str) -> str:
    return promql.by("sum", (), promql.shown(catalog.THREADPOOL_TOKENS, f'state="{state}"'))


def _delay(q: float) -> str:
    return promql.shown_quantile(q, catalog.LOOP_DELAY, (), _WORKERS)


def _first_row() -> Row:
    lag: panels.Steps = (
        (None, palette.GOOD),
        (thresholds.LOOP_LAG_WARNING, palette.WARN),
        (thresholds.LOOP_LAG_CRITICAL, palette.BAD),
    )
    busy: panels.Steps = ((None, palette.GOOD), (0.7, palette.WARN), (thresholds.LOOP_SATURATED, palette.BAD))
    blocked = promql.by("sum", (), promql.flow(catalog.LOOP_BLOCKED, 'cause!="starved"'))
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Delay, p99",
                "How late does the loop run what is due? Every request of the worker waits that long, at every await.",
                "s",
                _delay(0.99),
                steps=lag,
            ),
            panels.number(
                "Longest delay",
                "What was the longest single stall of the last 15 seconds, in any worker?",
                "s",
                promql.by("max", (), promql.shown(catalog.LOOP_DELAY_MAX, _WORKERS)),
                steps=lag,
            ),
            panels.number(
                "Busiest loop",
                "What share of time is the busiest worker's loop held? Near 100 % it can take no more requests.",
                "percentunit",
                promql.by("max", (), promql.shown(catalog.LOOP_UTILIZATION, _WORKERS)),
                steps=busy,
                decimals=0,
            ),
            panels.number(
                "Blocked",
                (
                    "How many seconds per second are loops stuck in one go for 100 ms or more, over all workers? The "
                    "table below names the code."
                ),
                "percentunit",
                promql.or_zero(blocked),
                steps=(
                    (None, palette.GOOD),
                    (thresholds.LOOP_BLOCKED_SHARE / 5, palette.WARN),
                    (thresholds.LOOP_BLOCKED_SHARE, palette.BAD),
                ),
                decimals=1,
            ),
            panels.number(
                "Threads in use",
                "How full is the threadpool that runs sync endpoints and dependencies? At 100 % they queue.",
                "percentunit",
                f"{_threads('used')} / {_threads('limit')}",
                steps=busy,
                decimals=0,
            ),
            panels.number(
                "Tasks",
                "How many tasks are alive on the loops? A number that only grows is a leak of tasks.",
                "short",
                promql.by("sum", (), promql.shown(catalog.LOOP_TASKS, _WORKERS)),
                decimals=0,
            ),
        ),
    )


def _delay_row() -> Row:
    limits = (("warning", thresholds.LOOP_LAG_WARNING), ("critical", thresholds.LOOP_LAG_CRITICAL))
    return Row(
        "How late is the loop?",
        across(
            9,
            panels.lines(
                "Delay of the event loop",
                (
                    "How long does ready work wait for the loop? A high max with a low p99 is a rare stall; a high "
                    "p99 is a loop that is blocked or full."
                ),
                "s",
                *(Query(_delay(q), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)),
                Query(promql.by("max", (), promql.shown(catalog.LOOP_DELAY_MAX, _WORKERS)), "max"),
                *(Query(f"vector({promql.number(limit)})", name) for name, limit in limits),
                colours={**palette.QUANTILES, "warning": palette.WARN, "critical": palette.BAD},
                limits=("warning", "critical"),
            ),
            panels.buckets(
                "Delay, spread",
                "Is every turn of the loop late, or few by much? A thin band far up is one blocking call.",
                "s",
                promql.by("sum", ("le",), promql.flow(catalog.LOOP_DELAY, _WORKERS, suffix="_bucket")),
            ),
        ),
    )


def _blame_row() -> Row:
    def in_time(metric: catalog.Metric) -> str:
        return promql.or_zero(f"({promql.by('sum', ('site', 'cause'), promql.total(metric))} > 0)", "site")

    share = promql.by("sum", ("site",), promql.flow(catalog.LOOP_BLOCKED))
    return Row(
        "Who blocked it?",
        (
            Cell(
                panels.listing(
                    "Code that held the loop, in the time shown",
                    (
                        "Which line of code blocks the loop? Move what it does to a thread, a worker process or an "
                        "async library. Starved means that the worker got no CPU."
                    ),
                    {"site": "Site", "cause": "Cause"},
                    Column("Blocked", in_time(catalog.LOOP_BLOCKED), "s", 1, bar=True),
                    Column("Times", in_time(catalog.LOOP_BLOCKS), "short", 0),
                    sort="Blocked",
                    widths={"Cause": 80, "Blocked": 170, "Times": 70},
                ),
                12,
                9,
            ),
            Cell(
                panels.lines(
                    "Blocked share by site",
                    "When did which code block the loop? The value is seconds of blocking per second.",
                    "percentunit",
                    Query(promql.or_zero(f"({promql.top(share)})", "site"), "{{site}}"),
                    legend="wide",
                    stacked=True,
                ),
                12,
                9,
            ),
        ),
    )


def _calls_row() -> Row:
    counted = promql.by("sum", ("site", "kind"), promql.total(catalog.BLOCKING_CALLS))
    by_kind = promql.by("sum", ("kind",), promql.flow(catalog.BLOCKING_CALLS))
    return Row(
        "What must not be called on the loop",
        (
            Cell(
                panels.listing(
                    "Blocking calls on the loop, in the time shown",
                    (
                        "Which code calls a synchronous database, Redis or HTTP client, sleeps, or waits for a file "
                        "or a process on the loop? Short today, it stalls the worker as long as the other side "
                        "stalls. None is right."
                    ),
                    {"site": "Site", "kind": "Kind"},
                    Column("Calls", promql.or_zero(f"({counted} > 0)", "site"), "short", 0, bar=True),
                    sort="Calls",
                    widths={"Kind": 110, "Calls": 170},
                ),
                12,
                8,
            ),
            Cell(
                panels.lines(
                    "Blocking calls by kind",
                    "Since when, and of which kind? A step up at a deploy is a new synchronous call.",
                    "ops",
                    Query(promql.or_zero(f"({by_kind} > 0)", "kind"), "{{kind}}"),
                    legend="wide",
                    stacked=True,
                ),
                12,
                8,
            ),
        ),
    )


def _load_row() -> Row:
    hold = promql.shown_quantile(0.99, catalog.LOOP_HOLD, ("http_route",))
    return Row(
        "Is it full?",
        across(
            8,
            panels.lines(
                "Utilization by worker",
                "How much of its time is each loop held? Workers that differ much get unequal traffic.",
                "percentunit",
                Query(_per_worker(catalog.LOOP_UTILIZATION), _NAME),
                Query(f"vector({promql.number(thresholds.LOOP_SATURATED)})", "limit"),
                limits=("limit",),
                maximum=1,
            ),
            panels.lines(
                "CPU of the loop's thread",
                "Is the loop computing or stuck? Utilization far above this means that it waits in a blocking call.",
                "percentunit",
                Query(_per_worker(catalog.LOOP_CPU), _NAME),
                maximum=1,
            ),
            panels.lines(
                "Longest hold by route, p99",
                "Which routes hold the loop longest in one go? Every other request of the worker waits that long.",
                "s",
                Query(promql.top(hold), "{{http_route}}"),
                legend="table",
            ),
        ),
    )


def _threads_row() -> Row:
    wait = (Query(promql.shown_quantile(q, catalog.THREADPOOL_WAIT, ()), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99))
    pause = promql.shown_quantile(0.99, catalog.GC_PAUSE, ("instance", "worker"), _WORKERS)
    return Row(
        "Threads, tasks and garbage collection",
        across(
            8,
            panels.lines(
                "Threadpool",
                "Do sync endpoints queue for a thread? Used at the limit with waiting above 0 means so.",
                "short",
                Query(_threads("used"), "used"),
                Query(_threads("waiting"), "waiting"),
                Query(_threads("limit"), "limit"),
                colours={"used": palette.NEUTRAL, "waiting": palette.WARN},
                limits=("limit",),
                decimals=0,
            ),
            panels.lines(
                "Wait for a thread",
                "How long does a sync endpoint wait before it starts?",
                "s",
                *wait,
                colours=palette.QUANTILES,
            ),
            panels.lines(
                "Tasks by worker",
                "Are tasks left behind? A line that only climbs is a leak.",
                "short",
                Query(_per_worker(catalog.LOOP_TASKS), _NAME),
                decimals=0,
            ),
            panels.lines(
                "Garbage-collection pauses, p99",
                "How long does a collection stop a worker? Long pauses come from many live objects.",
                "s",
                Query(pause, _NAME),
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Event loop",
        "How late does the event loop run, which code held it, and are there threads left?",
        (_first_row(), _delay_row(), _blame_row(), _calls_row(), _load_row(), _threads_row()),
        (board.WORKER,),
    )
