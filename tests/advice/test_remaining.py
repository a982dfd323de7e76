"""What is left of each limit, from 1 to 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_headroom import thresholds
from fastapi_headroom.advice.remaining import READS, Remaining, Samples, remaining
from fastapi_headroom.catalog import (
    LOOP_UTILIZATION,
    POOL_AUTOSIZE_BUDGET,
    POOL_AUTOSIZE_MAXIMUM,
    POOL_COUNT,
    POOL_MAX,
    POOL_PENDING,
    PROCESS_FDS,
    PROCESS_MAX_FDS,
    PROCESS_MEMORY,
    PROCESS_MEMORY_LIMIT,
    QUEUE_OLDEST_AGE,
    THREADPOOL_TOKENS,
    Metric,
)


def samples(*rows: tuple[Metric, tuple[str, ...], float]) -> Samples:
    found: dict[str, list[tuple[tuple[tuple[str, str], ...], float]]] = {}
    for metric, values, value in rows:
        pairs = tuple(sorted(zip(metric.labels, values, strict=True)))
        found.setdefault(metric.name, []).append((pairs, value))
    return found


def test_nothing_is_said_of_nothing() -> None:
    """Without samples there are no rows: unknown is not 0 and not 1."""
    assert remaining({}) == []


def test_a_pool_is_what_its_workers_have_left_together() -> None:
    """Used connections against the limit, per pool; idle ones do not count."""
    rows = remaining(
        samples(
            (POOL_COUNT, ("primary", "used"), 3.0),
            (POOL_COUNT, ("primary", "idle"), 7.0),
            (POOL_MAX, ("primary",), 15.0),
            (POOL_COUNT, ("replica", "used"), 5.0),
            (POOL_MAX, ("replica",), 5.0),
        )
    )
    assert rows == [("pool", "primary", pytest.approx(0.8)), ("pool", "replica", 0.0)]


def test_waiting_checkouts_count_as_use() -> None:
    """A pool that is full in one worker and idle in another is short as soon as checkouts wait."""
    rows = remaining(samples((POOL_COUNT, ("p", "used"), 5.0), (POOL_PENDING, ("p",), 8.0), (POOL_MAX, ("p",), 10.0)))
    assert rows == [("pool", "p", 0.0)]


def test_a_pool_that_autosize_may_let_grow_has_that_left_as_well() -> None:
    """At a limit of 2 with both in use nothing is short while the workers may have 6 each, within a budget of 8."""
    rows = [(POOL_COUNT, ("p", "used"), 2.0), (POOL_MAX, ("p",), 2.0)]
    rows += [(POOL_AUTOSIZE_MAXIMUM, ("p",), 12.0), (POOL_AUTOSIZE_BUDGET, ("p",), 8.0)]
    assert remaining(samples(*rows)) == [("pool", "p", 0.75)]


def test_a_pool_without_limit_has_no_row() -> None:
    """Where there is no limit nothing can be left of it."""
    assert remaining(samples((POOL_COUNT, ("null", "used"), 3.0))) == []


def test_the_busiest_loop_speaks_for_all() -> None:
    """One worker's held loop is what its requests feel."""
    rows = remaining(samples((LOOP_UTILIZATION, ("0",), 0.1), (LOOP_UTILIZATION, ("1",), 0.75)))
    assert rows == [("loop", "worst_worker", 0.25)]


def test_the_threadpool_counts_tasks_that_wait() -> None:
    """Threads in use and tasks waiting for one, against the limit."""
    tokens = samples(
        (THREADPOOL_TOKENS, ("used",), 20.0),
        (THREADPOOL_TOKENS, ("limit",), 80.0),
        (THREADPOOL_TOKENS, ("waiting",), 0),
    )
    assert remaining(tokens) == [("threadpool", "anyio", 0.75)]


def test_the_fullest_worker_speaks_for_memory_and_descriptors() -> None:
    """Each worker is held against its own limit; a worker without one says nothing."""
    rows = remaining(
        samples(
            (PROCESS_MEMORY, ("0",), 10.0),
            (PROCESS_MEMORY_LIMIT, ("0",), 100.0),
            (PROCESS_MEMORY, ("1",), 40.0),
            (PROCESS_MEMORY_LIMIT, ("1",), 50.0),
            (PROCESS_MEMORY, ("2",), 999.0),
            (PROCESS_FDS, ("0",), 64.0),
            (PROCESS_MAX_FDS, ("0",), 1024.0),
        )
    )
    assert rows == [("memory", "worst_worker", pytest.approx(0.2)), ("descriptors", "worst_worker", 0.9375)]


def test_a_queue_is_as_old_as_its_oldest_priority() -> None:
    """The oldest job over all priorities is held against the age that alerts."""
    half = thresholds.QUEUE_AGE_SECONDS / 2
    rows = remaining(
        samples(
            (QUEUE_OLDEST_AGE, ("redis", "mail", "0"), 0.0),
            (QUEUE_OLDEST_AGE, ("redis", "mail", "9"), half),
            (QUEUE_OLDEST_AGE, ("redis", "reports", "0"), 10 * half),
        )
    )
    assert rows == [("queue", "mail", 0.5), ("queue", "reports", 0.0)]


LABELS = {
    "db_client_connection_state": st.sampled_from(["used", "idle"]),
    "state": st.sampled_from(["used", "limit", "waiting"]),
}


@given(st.data())
def test_a_ratio_is_always_between_nothing_and_all(data: st.DataObject) -> None:
    """Whatever workers write, NaN and infinities too, every row is a share and no row comes twice."""
    rows = []
    for metric in READS:
        for _ in range(data.draw(st.integers(0, 3))):
            values = tuple(data.draw(LABELS.get(label, st.sampled_from(["a", "_overflow"]))) for label in metric.labels)
            rows.append((metric, values, data.draw(st.floats())))
    found: list[Remaining] = remaining(samples(*rows))
    assert all(0.0 <= row.ratio <= 1.0 for row in found)
    assert len({(row.resource, row.name) for row in found}) == len(found)
