"""Queues: whether jobs start in time."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, palette, panels, promql
from fastapi_headroom.pack.board import Row, Variable, across
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.rules import JOB, Rule

UID = "headroom-queue"
SYSTEM, QUEUE = "messaging_system", "messaging_destination_name"
# Several sidecars may poll one broker; each sees the same queue, so the instance is left out.
LABELS = ("job", SYSTEM, QUEUE, "priority")


# Who consumes and which run failed is known by queue, not by priority.
NAMED = ("job", SYSTEM, QUEUE)
TASK = (*NAMED, "headroom_task")


def _too_old() -> str:
    age = promql.by("max", LABELS, promql.highest(catalog.QUEUE_OLDEST_AGE, "2m"))
    return f"{age} > {promql.number(thresholds.QUEUE_AGE_SECONDS)}"


def _not_draining() -> str:
    depth = promql.series(catalog.QUEUE_DEPTH)
    least = promql.by("max", LABELS, f"min_over_time({depth}[30m])")
    return (
        f"{least} > {promql.number(thresholds.QUEUE_BACKLOG_JOBS)}\n"
        f"and {promql.by('max', LABELS, f'deriv({depth}[30m])')} > 0"
    )


def _no_consumers() -> str:
    # Where workers and not the broker tell who consumes, the last one to die takes the series with it.
    waiting = promql.by("max", NAMED, promql.highest(catalog.QUEUE_DEPTH, "2m"))
    now = promql.by("max", NAMED, promql.highest(catalog.QUEUE_CONSUMERS, "2m"))
    known = promql.by("max", NAMED, promql.highest(catalog.QUEUE_CONSUMERS, "1d"))
    return f"{waiting} > 0\nunless {now} > 0\nand {known} >= 0"


def _job_failures() -> str:
    failed = promql.by("sum", TASK, promql.rate(catalog.PROCESS_DURATION, "5m", 'error_type!=""', suffix="_count"))
    runs = promql.by("sum", TASK, promql.rate(catalog.PROCESS_DURATION, "5m", suffix="_count"))
    return (
        f"{failed}\n/ {runs}\n> {promql.number(thresholds.JOB_FAILURE_SHARE)}\n"
        f"and {failed} > {promql.number(thresholds.JOB_FAILURE_RATE)}"
    )


RULES = (
    Rule(
        name="QueueTooOld",
        expression=_too_old(),
        severity="warning",
        pending="2m",
        keep_firing="5m",
        summary="Jobs wait too long in a queue.",
        description=(
            f"{{{{ $labels.job }}}}: the oldest job ready in queue {{{{ $labels.{QUEUE} }}}} (priority "
            "{{ $labels.priority }}) has waited {{ $value | humanizeDuration }}."
        ),
        board=UID,
        variables=(*JOB, ("queue", QUEUE)),
    ),
    Rule(
        name="QueueNotDraining",
        expression=_not_draining(),
        severity="warning",
        pending="15m",
        summary="A queue grows: its consumers do not keep up.",
        description=(
            f"{{{{ $labels.job }}}}: queue {{{{ $labels.{QUEUE} }}}} (priority {{{{ $labels.priority }}}}) has had "
            '{{ $value | printf "%.0f" }} jobs or more ready for 30 minutes, and grows.'
        ),
        board=UID,
        variables=(*JOB, ("queue", QUEUE)),
    ),
    Rule(
        name="QueueNoConsumers",
        expression=_no_consumers(),
        severity="critical",
        pending="5m",
        summary="Jobs wait in a queue that nobody takes from.",
        description=(
            f"{{{{ $labels.job }}}}: queue {{{{ $labels.{QUEUE} }}}} has no consumer, and at least "
            '{{ $value | printf "%.0f" }} jobs of one priority are ready.'
        ),
        board=UID,
        variables=(*JOB, ("queue", QUEUE)),
    ),
    Rule(
        name="JobFailures",
        expression=_job_failures(),
        severity="warning",
        pending="2m",
        keep_firing="5m",
        summary="A task's jobs fail.",
        description=(
            "{{ $labels.job }}: {{ $value | humanizePercentage }} of the runs of {{ $labels.headroom_task }} "
            f"(queue {{{{ $labels.{QUEUE} }}}}) end in an error."
        ),
        board=UID,
        variables=(*JOB, ("queue", QUEUE)),
    ),
)


_QUEUES = f'{QUEUE}=~"$queue"'
_NAME = f"{{{{{QUEUE}}}}} {{{{priority}}}}"
_SAME = (SYSTEM, QUEUE, "priority")
_CUT_SHORT = (
    "SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLostError",  # Celery
    "JobTimeoutException", "WorkHorseKilled",  # RQ
    "TimeoutError", "CancelledError",  # asyncio, for what is built on it
)  # fmt: skip
"""Error types of runs that a time limit ended, or whose process was killed."""


def _gauge(metric: catalog.Metric, labels: tuple[str, ...] = _SAME) -> str:
    # Several sidecars may see the same queue: the highest value, not the sum, is the queue's.
    seen = promql.by("max", _SAME, promql.shown(metric, _QUEUES))
    return seen if labels == _SAME else promql.by("sum", labels, seen)


def _consumers() -> str:
    # Workers that tell it themselves take the series with them when they die: nobody is left, which is 0.
    gone = promql.by("max", _SAME, f"last_over_time({promql.shown(catalog.QUEUE_CONSUMERS, _QUEUES)}[$__range])")
    return f"{_gauge(catalog.QUEUE_CONSUMERS)} or 0 * {gone}"


def _published(labels: tuple[str, ...] = ()) -> str:
    return promql.by("sum", labels, promql.flow(catalog.PUBLISH_DURATION, _QUEUES, suffix="_count"))


def _finished(labels: tuple[str, ...] = (), *matchers: str) -> str:
    return promql.by("sum", labels, promql.flow(catalog.PROCESS_DURATION, _QUEUES, *matchers, suffix="_count"))


def _first_row() -> Row:
    age: panels.Steps = (
        (None, palette.GOOD),
        (thresholds.QUEUE_AGE_SECONDS / 2, palette.WARN),
        (thresholds.QUEUE_AGE_SECONDS, palette.BAD),
    )
    depth = _gauge(catalog.QUEUE_DEPTH, ())
    failed = promql.ratio(_finished((), 'error_type!=""'), _finished())
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Oldest job",
                "How long has the oldest job that is ready to run waited? Age, not depth, is what users feel.",
                "s",
                f"max({_gauge(catalog.QUEUE_OLDEST_AGE)})",
                steps=age,
            ),
            panels.number(
                "Jobs ready",
                "How many jobs are ready to run? Delayed jobs do not count.",
                "short",
                _gauge(catalog.QUEUE_DEPTH, ()),
                decimals=0,
            ),
            panels.number(
                "Time to drain",
                (
                    "At today's surplus of finished over published jobs, when is the backlog gone? No value means "
                    "that it grows or is empty."
                ),
                "s",
                f"({depth} == 0) or {depth} / (({_finished()} - {_published()}) > 0)",
                spark=False,
                empty="not draining",
            ),
            panels.number(
                "Wait, p95",
                "How long does one job in twenty wait at least before it starts?",
                "s",
                promql.shown_quantile(0.95, catalog.QUEUE_WAIT, (), _QUEUES),
                steps=age,
            ),
            panels.number(
                "Failed",
                "What share of jobs ends in an error?",
                "percentunit",
                promql.or_zero(failed),
                steps=((None, palette.GOOD), (0.01, palette.WARN), (0.05, palette.BAD)),
                decimals=1,
            ),
            panels.number(
                "Background tasks",
                (
                    "How many BackgroundTasks run inside the web workers now? They die with their worker; bulk work "
                    "belongs in a queue."
                ),
                "short",
                promql.or_zero(promql.by("sum", (), promql.shown(catalog.BACKGROUND_TASKS))),
                decimals=0,
            ),
        ),
    )


def _backlog_row() -> Row:
    # From the depth alone, so that it is there for queues whose workers measure nothing.
    depth = _gauge(catalog.QUEUE_DEPTH)
    falling = promql.by("max", _SAME, f"deriv({promql.shown(catalog.QUEUE_DEPTH, _QUEUES)}[{promql.INTERVAL}])")
    return Row(
        "Does it keep up?",
        (
            *across(
                9,
                panels.lines(
                    "Age of the oldest job",
                    "Which queue falls behind? A straight climb means that nobody takes from it.",
                    "s",
                    Query(_gauge(catalog.QUEUE_OLDEST_AGE), _NAME),
                    Query(f"vector({promql.number(thresholds.QUEUE_AGE_SECONDS)})", "limit"),
                    limits=("limit",),
                ),
                panels.lines(
                    "Depth",
                    "How much work lies ahead, by queue and priority?",
                    "short",
                    Query(_gauge(catalog.QUEUE_DEPTH), _NAME),
                    stacked=True,
                    decimals=0,
                ),
                panels.lines(
                    "In against out",
                    (
                        "Do consumers finish what is published? Published above finished for long is a backlog in "
                        "the making."
                    ),
                    "ops",
                    Query(_published(), "published"),
                    Query(_finished(), "finished"),
                    colours={"published": palette.WARN, "finished": palette.GOOD},
                ),
            ),
            *across(
                8,
                panels.lines(
                    "Time to drain by queue",
                    (
                        "If it goes on shrinking as now, when is each queue empty? No line means that it is empty, or "
                        "does not shrink."
                    ),
                    "s",
                    Query(f"({depth} > 0) / -({falling} < 0)", _NAME),
                ),
                panels.lines(
                    "Consumers",
                    "Who takes jobs from the queue? None means that nobody does. Not every broker shows it.",
                    "short",
                    Query(_consumers(), _NAME),
                    decimals=0,
                ),
                panels.lines(
                    "Delayed and failed",
                    (
                        "What else is there? Jobs that are due later or wait for another one, and those that failed "
                        "for good and are kept. Only where the broker shows it."
                    ),
                    "short",
                    Query(_gauge(catalog.QUEUE_DELAYED), f"delayed {_NAME}"),
                    Query(_gauge(catalog.QUEUE_FAILED), f"failed {_NAME}"),
                    decimals=0,
                ),
            ),
        ),
    )


def _jobs_row() -> Row:
    task = "headroom_task"
    waits = (
        Query(promql.shown_quantile(q, catalog.QUEUE_WAIT, (), _QUEUES), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)
    )
    failures = promql.by(
        "sum", (task, "error_type"), promql.flow(catalog.PROCESS_DURATION, _QUEUES, 'error_type!=""', suffix="_count")
    )
    retries = promql.by("sum", (task,), promql.flow(catalog.QUEUE_RETRIES, _QUEUES))
    cut = promql.by(
        "sum",
        (task, "error_type"),
        promql.flow(catalog.PROCESS_DURATION, _QUEUES, f'error_type=~"{"|".join(_CUT_SHORT)}"', suffix="_count"),
    )
    return Row(
        "Which jobs?",
        (
            *across(
                8,
                panels.lines(
                    "Wait before the start",
                    "How long do jobs lie in the queue?",
                    "s",
                    *waits,
                    colours=palette.QUANTILES,
                ),
                panels.lines(
                    "Run time by task, p95",
                    "Which task got slower? A slow task fills the consumers and makes every other one wait.",
                    "s",
                    Query(promql.shown_quantile(0.95, catalog.PROCESS_DURATION, (task,), _QUEUES), f"{{{{{task}}}}}"),
                    legend="table",
                ),
                panels.lines(
                    "Finished by task",
                    "What do the consumers spend their time on?",
                    "ops",
                    Query(_finished((task,)), f"{{{{{task}}}}}"),
                    legend="table",
                    stacked=True,
                ),
            ),
            *across(
                8,
                panels.lines(
                    "Failures and retries",
                    "Which task fails, and how? Retries without failures are hiccups; failures are lost jobs.",
                    "ops",
                    Query(promql.or_zero(f"({failures} > 0)", task), f"{{{{{task}}}}} {{{{error_type}}}}"),
                    Query(promql.or_zero(f"({retries} > 0)", task), f"retry {{{{{task}}}}}"),
                ),
                panels.lines(
                    "Time-outs and killed runs",
                    (
                        "Which task is cut short, by its time limit or because its process was killed? Killed mostly "
                        "means out of memory. Soft limits and time-outs that a job handles itself do not show."
                    ),
                    "ops",
                    Query(promql.or_zero(f"({cut} > 0)", task), f"{{{{{task}}}}} {{{{error_type}}}}"),
                ),
                panels.lines(
                    "In progress",
                    "How many jobs are with a consumer and not yet acknowledged? Far more than consumers: prefetching.",
                    "short",
                    Query(_gauge(catalog.QUEUE_IN_PROGRESS, (QUEUE,)), f"in progress {{{{{QUEUE}}}}}"),
                    decimals=0,
                ),
                panels.lines(
                    "Time to publish, p95",
                    "How long does a request wait for the broker when it hands over a job?",
                    "s",
                    Query(promql.shown_quantile(0.95, catalog.PUBLISH_DURATION, (QUEUE,), _QUEUES), f"{{{{{QUEUE}}}}}"),
                ),
            ),
        ),
    )


def _background_row() -> Row:
    task = "headroom_task"
    running = promql.by("sum", (task,), promql.shown(catalog.BACKGROUND_TASKS))
    failed = promql.by("sum", (task,), promql.flow(catalog.BACKGROUND_TASK_FAILURES))
    return Row(
        "BackgroundTasks inside the web workers",
        across(
            7,
            panels.lines(
                "Running",
                "How many BackgroundTasks run in the web workers? They share the loop and the pool with requests.",
                "short",
                Query(running, f"{{{{{task}}}}}"),
                stacked=True,
                decimals=0,
            ),
            panels.lines(
                "Run time, p95",
                "How long do they take? Long ones are lost when a worker is restarted.",
                "s",
                Query(promql.shown_quantile(0.95, catalog.BACKGROUND_TASK_DURATION, (task,)), f"{{{{{task}}}}}"),
            ),
            panels.lines(
                "Wait before the start, p95",
                "How long do they wait for the rest of their request, and for the tasks of it that stand before them?",
                "s",
                Query(promql.shown_quantile(0.95, catalog.BACKGROUND_TASK_WAIT, (task,)), f"{{{{{task}}}}}"),
            ),
            panels.lines(
                "Failures",
                "Which of them fail? Nobody tries again, and those of the same response behind a failed one never run.",
                "ops",
                Query(failed, f"{{{{{task}}}}}"),
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Queues",
        "Do jobs start in time, do the consumers keep up, and which task is to blame?",
        (_first_row(), _backlog_row(), _jobs_row(), _background_row()),
        (Variable("queue", catalog.QUEUE_DEPTH, QUEUE, "Queue"),),
    )
