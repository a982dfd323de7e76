"""Workers, memory and the measuring itself."""

from __future__ import annotations

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.pack import board, palette, panels, promql, runtime_workers
from fastapi_headroom.pack.board import Cell, Row, across
from fastapi_headroom.pack.panels import Query
from fastapi_headroom.pack.rules import INSTANCE, JOB, WORKER, Rule

UID = "headroom-runtime"
INSTANCES = ("job", "instance")


def _all_down() -> str:
    # `up` is every target's; only jobs that exported our series within a day are ours to watch.
    ours = promql.by("count", ("job",), f"last_over_time({promql.series(catalog.SERIES)}[1d])")
    alive = 'state="alive"'
    # A sidecar answers while the app is gone: no worker alive, where there was one within a day.
    now = promql.by("sum", ("job",), promql.highest(catalog.WORKERS, "1m", alive))
    before = promql.by("sum", ("job",), promql.highest(catalog.WORKERS, "1d", alive))
    return (
        promql.block(f"sum by (job) (max_over_time(up[1m])) == 0\nand on (job) {ours}")
        + "\nor "
        + promql.block(f"{now} == 0\nand {before} > 0")
    )


def _memory() -> str:
    # Workers of one instance share its control group, so their sum meets the limit.
    used = promql.by("sum", INSTANCES, promql.highest(catalog.PROCESS_MEMORY, "5m"))
    limit = promql.by("max", INSTANCES, promql.highest(catalog.PROCESS_MEMORY_LIMIT, "5m"))
    return f"{used}\n/ {limit}\n> {promql.number(thresholds.MEMORY_SHARE)}"


def _probe_down() -> str:
    return f"{promql.by('min', (*INSTANCES, 'probe'), promql.highest(catalog.PROBE_UP, '5m'))} == 0"


def _instance_down() -> str:
    ours = promql.by("count", INSTANCES, f"last_over_time({promql.series(catalog.SERIES)}[1d])")
    return f"max by (job, instance) (max_over_time(up[1m])) == 0\nand on (job, instance) {ours}"


def _workers_missing() -> str:
    def most(state: str) -> str:
        return promql.by("max", INSTANCES, promql.highest(catalog.WORKERS, "2m", f'state="{state}"'))

    return f"{most('expected')} - {most('alive')} > 0"


def _descriptors() -> str:
    labels = (*INSTANCES, "worker")
    used = promql.by("max", labels, promql.highest(catalog.PROCESS_FDS, "5m"))
    limit = promql.by("max", labels, promql.highest(catalog.PROCESS_MAX_FDS, "5m"))
    return f"{used}\n/ {limit}\n> {promql.number(thresholds.DESCRIPTOR_SHARE)}"


def _low_headroom() -> str:
    left = promql.by("min", (*INSTANCES, "resource", "name"), promql.highest(catalog.REMAINING, "5m"))
    return f"{left} < {promql.number(thresholds.REMAINING_LOW)}"


def _capped() -> str:
    return f"{promql.by('sum', INSTANCES, promql.increase(catalog.LABEL_OVERFLOW, '15m'))} > 0"


RULES = (
    Rule(
        name="AllInstancesDown",
        expression=_all_down(),
        severity="critical",
        pending="1m",
        summary="No instance of the app answers.",
        description="{{ $labels.job }}: no target is up, or the sidecar sees no worker alive.",
        board=UID,
        variables=JOB,
    ),
    Rule(
        name="InstanceDown",
        expression=_instance_down(),
        severity="warning",
        pending="2m",
        summary="One instance of the app does not answer.",
        description="{{ $labels.job }}: {{ $labels.instance }} cannot be scraped; the other instances carry its load.",
        board=UID,
        variables=JOB,
    ),
    Rule(
        name="WorkersMissing",
        expression=_workers_missing(),
        severity="warning",
        pending="5m",
        summary="Fewer workers serve than should.",
        description='{{ $labels.job }} ({{ $labels.instance }}): {{ $value | printf "%.0f" }} workers are missing.',
        board=UID,
        variables=INSTANCE,
    ),
    *runtime_workers.RULES,
    Rule(
        name="MemoryNearLimit",
        expression=_memory(),
        severity="warning",
        pending="5m",
        summary="The workers are about to be killed for memory.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): the workers use {{ $value | humanizePercentage }} "
            "of the memory that they may use."
        ),
        board=UID,
        variables=INSTANCE,
    ),
    Rule(
        name="DescriptorsNearLimit",
        expression=_descriptors(),
        severity="warning",
        pending="5m",
        summary="A worker is about to run out of file descriptors.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}, worker {{ $labels.worker }}): "
            "{{ $value | humanizePercentage }} of the file descriptors are in use."
        ),
        board=UID,
        variables=WORKER,
    ),
    Rule(
        name="LowHeadroom",
        expression=_low_headroom(),
        severity="info",
        pending="10m",
        summary="A resource is nearly used up.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): {{ $labels.resource }} {{ $labels.name }} has "
            "{{ $value | humanizePercentage }} of its limit left."
        ),
        board="headroom-overview",
        variables=INSTANCE,
    ),
    Rule(
        name="ProbeDown",
        expression=_probe_down(),
        severity="warning",
        pending="1m",
        summary="A probe failed; what it measures may be missing or wrong.",
        description=(
            "{{ $labels.job }} ({{ $labels.instance }}): the {{ $labels.probe }} probe failed. The app is not "
            "affected, but boards and alerts on it cannot be trusted."
        ),
        board=UID,
        variables=INSTANCE,
    ),
    Rule(
        name="CardinalityCapped",
        expression=_capped(),
        severity="warning",
        summary="A label has too many values; new series are folded into `_overflow`.",
        description=(
            '{{ $labels.job }} ({{ $labels.instance }}): {{ $value | printf "%.0f" }} label sets were folded within '
            "15 minutes."
        ),
        board=UID,
        variables=INSTANCE,
    ),
    Rule(
        name="Watchdog",
        expression="vector(1)",
        severity="info",
        summary="Always fires, to show that alerts reach the receiver.",
        description="If this alert stops arriving, the way from Prometheus to the receiver is broken.",
        board="headroom-overview",
        variables=(),
    ),
)


_WORKERS = 'worker=~"$worker"'
_NAME = "{{instance}} / {{worker}}"
_PER_WORKER = ("instance", "worker")


def _per_worker(metric: catalog.Metric) -> str:
    return promql.by("max", _PER_WORKER, promql.shown(metric, _WORKERS))


def _workers(state: str) -> str:
    return promql.by("sum", (), promql.shown(catalog.WORKERS, f'state="{state}"'))


def _memory_share() -> str:
    used = promql.by("sum", ("instance",), promql.shown(catalog.PROCESS_MEMORY))
    return f"{used} / {promql.by('max', ('instance',), promql.shown(catalog.PROCESS_MEMORY_LIMIT))}"


def _first_row() -> Row:
    share: panels.Steps = ((None, palette.GOOD), (0.75, palette.WARN), (thresholds.MEMORY_SHARE, palette.BAD))
    restarts = promql.by("sum", (), promql.total(catalog.WORKER_RESTARTS))
    files = f"max({_per_worker(catalog.PROCESS_FDS)} / {_per_worker(catalog.PROCESS_MAX_FDS)})"
    cpu = promql.by("sum", (), promql.flow(catalog.PROCESS_CPU, _WORKERS))
    down = promql.by("count", (), f"{promql.shown(catalog.PROBE_UP)} == 0")
    return Row(
        "Is it bad?",
        across(
            4,
            panels.number(
                "Workers alive",
                "How many workers serve? Compare with the expected number below.",
                "short",
                _workers("alive"),
                steps=((None, palette.BAD), (1, palette.GOOD)),
                decimals=0,
            ),
            panels.number(
                "Restarts",
                "How many workers were replaced in the time shown? Steady restarts are a crash loop.",
                "short",
                restarts,
                steps=((None, palette.GOOD), (0.5, palette.WARN), (5, palette.BAD)),
                decimals=0,
                spark=False,
            ),
            panels.number(
                "Memory of the limit",
                "How near are the workers of the fullest instance to being killed for memory?",
                "percentunit",
                f"max({_memory_share()})",
                steps=share,
                decimals=0,
            ),
            panels.number("CPU", "How many cores do the workers use together?", "short", cpu, decimals=2),
            panels.number(
                "File descriptors",
                "How near is the fullest worker to its limit of open files and sockets? At 100 % it can accept nobody.",
                "percentunit",
                files,
                steps=share,
                decimals=1,
            ),
            panels.number(
                "Probes failed",
                "Does the measuring itself work? A failed probe leaves its boards and alerts blind.",
                "short",
                promql.or_zero(down),
                steps=panels.ZERO_IS_GOOD,
                decimals=0,
            ),
        ),
    )


def _workers_row() -> Row:
    skew = promql.by("sum", _PER_WORKER, promql.flow(catalog.WORKER_REQUESTS, _WORKERS))
    backlog = promql.by("max", ("instance", "port"), promql.shown(catalog.ACCEPT_BACKLOG))
    return Row(
        "Workers",
        across(
            8,
            panels.lines(
                "Alive and expected",
                "Are workers missing? Alive below expected means that a worker died and was not replaced.",
                "short",
                Query(_workers("alive"), "alive"),
                Query(_workers("expected"), "expected"),
                colours={"alive": palette.GOOD, "expected": palette.QUIET},
                limits=("expected",),
                decimals=0,
            ),
            panels.lines(
                "Requests per worker",
                "Is the traffic spread evenly? A worker far above the others gives way first.",
                "reqps",
                Query(skew, _NAME),
                stacked=True,
            ),
            panels.lines(
                "Waiting to be accepted",
                (
                    "Do connections pile up before the app even sees them? Anything lasting means that the workers "
                    "are full or stuck."
                ),
                "short",
                Query(backlog, "{{instance}} port {{port}}"),
                decimals=0,
            ),
            panels.lines(
                "Age of the workers",
                "When did each worker start? Saw teeth are restarts.",
                "s",
                Query(f"time() - {_per_worker(catalog.PROCESS_START)}", _NAME),
            ),
        ),
    )


def _resources_row() -> Row:
    growth = promql.by("sum", _PER_WORKER, f"deriv({promql.shown(catalog.PROCESS_MEMORY, _WORKERS)}[30m])")
    limit = promql.by("max", (), promql.shown(catalog.PROCESS_MEMORY_LIMIT))
    cpu = promql.by("sum", _PER_WORKER, promql.flow(catalog.PROCESS_CPU, _WORKERS))
    pauses = promql.by("sum", _PER_WORKER, promql.flow(catalog.GC_PAUSE, _WORKERS, suffix="_sum"))
    return Row(
        "Memory, CPU and descriptors",
        (
            *across(
                8,
                panels.lines(
                    "Memory by worker",
                    "How much memory does each worker keep? Stacked, because all of an instance share one limit.",
                    "bytes",
                    Query(_per_worker(catalog.PROCESS_MEMORY), _NAME),
                    stacked=True,
                ),
                panels.lines(
                    "Memory against the limit",
                    "How long until the limit? The dashed line is what the instance may use.",
                    "bytes",
                    Query(promql.by("sum", ("instance",), promql.shown(catalog.PROCESS_MEMORY)), "{{instance}}"),
                    Query(limit, "limit"),
                    limits=("limit",),
                ),
                panels.lines(
                    "Memory growth",
                    (
                        "Does memory leak? The slope over 30 minutes; above zero for hours is a leak, not a cache "
                        "that fills."
                    ),
                    "binBps",
                    Query(growth, _NAME),
                    minimum=None,
                ),
            ),
            *across(
                8,
                panels.lines(
                    "CPU by worker",
                    "Which worker computes? One core is the most that one worker can use.",
                    "percentunit",
                    Query(cpu, _NAME),
                ),
                panels.lines(
                    "Open descriptors by worker",
                    "Are sockets or files left open? A line that only climbs is a leak.",
                    "short",
                    Query(_per_worker(catalog.PROCESS_FDS), _NAME),
                    decimals=0,
                ),
                panels.lines(
                    "Time in garbage collection",
                    "What share of time does each worker stand still for garbage collection?",
                    "percentunit",
                    Query(pauses, _NAME),
                ),
            ),
        ),
    )


def _cost_row() -> Row:
    def each(metric: catalog.Metric) -> str:
        return promql.by("sum", ("instance",), promql.shown(metric))

    errors = promql.by("sum", ("probe",), promql.flow(catalog.PROBE_ERRORS))
    return Row(
        "What does the measuring cost, and does it work?",
        (
            Cell(
                panels.lines(
                    "Time of a scrape",
                    (
                        "How long does the exporter take to read and render? Far below Prometheus' scrape time-out "
                        "is fine."
                    ),
                    "s",
                    Query(each(catalog.SCRAPE_DURATION), "{{instance}}"),
                ),
                6,
                7,
            ),
            Cell(
                panels.lines(
                    "Series",
                    "How many series does Prometheus get? A steep rise is a label with too many values.",
                    "short",
                    Query(each(catalog.SERIES), "{{instance}}"),
                ),
                6,
                7,
            ),
            Cell(
                panels.lines(
                    "Errors of probes",
                    "Does a probe fail? It spares the app, but what it measures may be missing.",
                    "ops",
                    Query(errors, "{{probe}}"),
                ),
                6,
                7,
            ),
            Cell(
                panels.lines(
                    "Lost or folded",
                    (
                        "Is anything not counted as it should be? Folded label sets, workers that count in memory "
                        "only, and files that could not be read: all should be 0."
                    ),
                    "short",
                    Query(promql.by("sum", (), promql.flow(catalog.LABEL_OVERFLOW)), "label sets folded /s"),
                    Query(promql.by("sum", (), promql.shown(catalog.STORE_DEGRADED)), "workers in memory only"),
                    Query(promql.by("sum", (), promql.shown(catalog.SLOTS_UNREADABLE)), "files unreadable"),
                ),
                6,
                7,
            ),
        ),
    )


def render() -> str:
    """Return the board as JSON."""
    return board.build(
        UID,
        "Headroom / Workers and memory",
        "Are all workers there, how near are memory and descriptors to their limits, and what does measuring cost?",
        (_first_row(), _workers_row(), _resources_row(), _cost_row()),
        (board.WORKER,),
    )
