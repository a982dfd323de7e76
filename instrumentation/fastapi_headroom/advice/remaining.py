"""What is left of each limit, from 1 (idle) to 0 (exhausted), computed from one scrape's merged samples.

Pure functions: samples in, rows out. A limit that is unknown gives no row. Where each worker has a limit of
its own, the worst worker speaks for all (its row is named ``worst_worker``): one full worker already fails requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastapi_headroom import catalog, thresholds

Labels = tuple[tuple[str, str], ...]
Samples = Mapping[str, Sequence[tuple[Labels, float]]]
"""Sample name -> its series: label pairs and value."""
READS = (
    catalog.POOL_COUNT,
    catalog.POOL_PENDING,
    catalog.POOL_MAX,
    catalog.POOL_AUTOSIZE_MAXIMUM,
    catalog.POOL_AUTOSIZE_BUDGET,
    catalog.LOOP_UTILIZATION,
    catalog.THREADPOOL_TOKENS,
    catalog.QUEUE_OLDEST_AGE,
    catalog.PROCESS_MEMORY,
    catalog.PROCESS_MEMORY_LIMIT,
    catalog.PROCESS_FDS,
    catalog.PROCESS_MAX_FDS,
)
"""The gauges that are looked at; others need not be given."""
WORST_WORKER = "worst_worker"


class Remaining(NamedTuple):
    """One row of ``headroom_remaining_ratio``."""

    resource: str
    name: str
    ratio: float


def remaining(samples: Samples) -> list[Remaining]:
    """Return what is left of every limit that the samples tell of."""
    rows = [*_pools(samples), *_loop(samples), *_threadpool(samples), *_queues(samples)]
    rows += _worst_worker("memory", samples, catalog.PROCESS_MEMORY.name, catalog.PROCESS_MEMORY_LIMIT.name)
    rows += _worst_worker("descriptors", samples, catalog.PROCESS_FDS.name, catalog.PROCESS_MAX_FDS.name)
    return rows


def _pools(samples: Samples) -> Iterable[Remaining]:
    """Connections in use and checkouts that wait, against the pool's limit, both summed over the workers.

    Waiting checkouts count as use: a pool that is full in one worker and idle in another is short, not half free.
    Where autosize moves the limit, what counts is how far it may.
    """
    label = "db_client_connection_pool_name"
    demand = _by(samples, catalog.POOL_PENDING.name, label)
    for labels, value in samples.get(catalog.POOL_COUNT.name, ()):
        pairs = dict(labels)
        if pairs.get("db_client_connection_state") == "used" and label in pairs:
            demand[pairs[label]] = demand.get(pairs[label], 0.0) + value
    limits = _by(samples, catalog.POOL_MAX.name, label)
    reach, budgets = (
        _by(samples, metric.name, label) for metric in (catalog.POOL_AUTOSIZE_MAXIMUM, catalog.POOL_AUTOSIZE_BUDGET)
    )
    for name in sorted(demand.keys() & limits.keys()):
        limit = max(limits[name], min(reach.get(name, 0.0), budgets.get(name, 0.0)))
        yield from _row("pool", name, demand[name], limit)


def _loop(samples: Samples) -> Iterable[Remaining]:
    """The share of time that the busiest worker's event loop was free."""
    held = [value for _, value in samples.get(catalog.LOOP_UTILIZATION.name, ())]
    if held:
        yield from _row("loop", WORST_WORKER, max(held), 1.0)


def _threadpool(samples: Samples) -> Iterable[Remaining]:
    """Threads of AnyIO's pool in use and tasks that wait for one, against the limit, summed over the workers."""
    tokens = _by(samples, catalog.THREADPOOL_TOKENS.name, "state")
    if "used" in tokens and "limit" in tokens:
        yield from _row("threadpool", "anyio", tokens["used"] + tokens.get("waiting", 0.0), tokens["limit"])


def _queues(samples: Samples) -> Iterable[Remaining]:
    """The age of a queue's oldest ready job against ``thresholds.QUEUE_AGE_SECONDS``; its worst priority counts."""
    oldest: dict[str, float] = {}
    for labels, age in samples.get(catalog.QUEUE_OLDEST_AGE.name, ()):
        queue = dict(labels).get("messaging_destination_name")
        if queue is not None:
            oldest[queue] = max(age, oldest.get(queue, 0.0))
    for queue in sorted(oldest):
        yield from _row("queue", queue, oldest[queue], thresholds.QUEUE_AGE_SECONDS)


def _worst_worker(resource: str, samples: Samples, use_name: str, limit_name: str) -> Iterable[Remaining]:
    use, limits = _by(samples, use_name, "worker"), _by(samples, limit_name, "worker")
    ratios = [
        row.ratio
        for worker in use.keys() & limits.keys()
        for row in _row(resource, WORST_WORKER, use[worker], limits[worker])
    ]
    if ratios:
        yield Remaining(resource, WORST_WORKER, min(ratios))


def _row(resource: str, name: str, use: float, limit: float) -> Iterable[Remaining]:
    if limit > 0 and use == use:  # no limit, or not a number: nothing can be said
        yield Remaining(resource, name, min(1.0, max(0.0, 1.0 - use / limit)))


def _by(samples: Samples, name: str, label: str) -> dict[str, float]:
    """Return a gauge's values by one label, summed over its other labels."""
    values: dict[str, float] = {}
    for labels, value in samples.get(name, ()):
        key = dict(labels).get(label)
        if key is not None:
            values[key] = values.get(key, 0.0) + value
    return values
