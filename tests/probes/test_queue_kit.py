"""The queue kit: what every poller promises, tried with the real library, a real broker and real workers."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo_app.stack.process import wait_until
from fastapi_headroom import catalog
from fastapi_headroom.exporter.pollers import PolledQueue
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.queue_jobs import marks
from tests.support.queue_kit import Polled, Subject, kill, sleep_until, total
from tests.support.queue_subjects import SLOW, SUBJECTS

pytestmark = pytest.mark.timeout(300)  # workers start, on a machine that may be busy

DEPTH, AGE, BUSY = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE, catalog.QUEUE_IN_PROGRESS
CONSUMERS, DELAYED, FAILED = catalog.QUEUE_CONSUMERS, catalog.QUEUE_DELAYED, catalog.QUEUE_FAILED


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[type], object]]:
    """One broker of each kind, which tests may restart."""
    with contextlib.ExitStack() as running:
        found: dict[type, object] = {}

        def broker(kind: type) -> object:
            if kind not in found:
                found[kind] = running.enter_context(kind(tmp_path_factory.mktemp(kind.__name__) / "broker"))
            return found[kind]

        yield broker


KINDS = [*SUBJECTS, *(pytest.param(kind, marks=pytest.mark.soak) for kind in SLOW)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest, brokers: Callable[[type], object]) -> tuple[type[Subject], object]:
    """Each kind of queue in turn."""
    return request.param, brokers(request.param.broker)


@pytest.fixture
def subject(kind: tuple[type[Subject], object], tmp_path: Path) -> Iterator[Subject]:
    """An empty queue, and a publisher that is measured as in an app."""
    made = kind[0](kind[1], tmp_path)  # type: ignore[arg-type]
    made.start()
    probe = QueueProbe(load({}))
    probe.bind(Writer.in_memory())
    yield made
    probe.close()
    made.forget()


def needs(subject: Subject, metric: catalog.Metric) -> None:
    """Skip where this broker cannot show the row."""
    if metric not in subject.sees:
        pytest.skip(f"{type(subject).__name__} does not show {metric.name}")


def test_depth_is_the_truth_at_each_poll(subject: Subject) -> None:
    """Of 1,000 jobs that are enqueued by a known schedule, run and purged, every poll counts those that are ready."""
    polled = Polled(subject)
    for batch in range(10):
        assert polled.depth() == batch * 100
        subject.publish(100)
    assert polled.depth() == subject.truth() == 1_000
    polls = [polled.between(subject.truth)]
    left = 980 if subject.system == "rabbitmq" else 800  # Celery takes a few jobs from RabbitMQ and pauses for seconds
    with subject.worker():
        deadline = time.monotonic() + 60
        while polls[-1][1] > left and time.monotonic() < deadline:
            sleep_until(time.time() + 0.03)
            polls.append(polled.between(subject.truth))
    assert polls[-1][1] <= left
    for before, counted, after in polls:
        assert before >= counted >= after
    assert all(earlier[1] >= later[1] for earlier, later in itertools.pairwise(polls))
    if CONSUMERS in subject.sees:  # what a worker held comes back when the broker has noticed its end
        wait_until(lambda: polled(CONSUMERS) == 0.0, 60, "no worker")
    wait_until(lambda: polled.depth() == subject.truth(), 60, "the worker's last job")
    subject.purge()
    assert polled.depth() == subject.truth() == 0


def test_only_what_a_broker_shows_has_series(subject: Subject) -> None:
    """A state that cannot be seen has no series; one that can has one from the first poll, with nothing to do too."""
    polled = Polled(subject)
    assert set(polled.values()) == subject.sees
    subject.publish(3)
    assert set(polled.values()) == subject.sees


def test_the_oldest_age_is_that_of_the_oldest_job(subject: Subject) -> None:
    """The age grows with the first job that is ready, and 0 is said of an empty queue only."""
    needs(subject, AGE)
    polled = Polled(subject)
    assert polled(AGE) == 0.0
    before = time.time()
    subject.publish()
    published = time.time()
    for seconds in (0.3, 0.6, 0.9):
        sleep_until(published + seconds)
        subject.publish()
        asked = time.time()
        assert asked - published - 0.01 <= polled(AGE) <= time.time() - before + 0.01
    subject.purge()
    assert polled(AGE) == 0.0


def test_jobs_in_progress_are_counted_until_they_end(subject: Subject) -> None:
    """A job that a worker holds is in progress and no longer ready, and neither when it is done."""
    needs(subject, BUSY)
    polled = Polled(subject)
    subject.publish(kind="hold")
    with subject.worker():
        wait_until(lambda: marks(subject.folder / "holding") == 1, 60, "the job to begin")
        values = polled.values()
        assert (values[BUSY], values[DEPTH]) == (1.0, 0.0)
        (subject.folder / "gate").touch()
        wait_until(lambda: polled(BUSY) == 0.0, 60, "the job to end")


def test_consumers_are_counted(subject: Subject) -> None:
    """There is no consumer before a worker runs, one while it does, and none after its end; where the broker does not
    know, the worker says it, and there is no series without one."""
    if CONSUMERS in subject.tells:
        labels = {"messaging_system": subject.system, "messaging_destination_name": subject.destination}

        def consumers() -> float:
            return total(subject.folder / "store", CONSUMERS.name, **labels)

    else:
        needs(subject, CONSUMERS)
        polled = Polled(subject)

        def consumers() -> float:
            return polled(CONSUMERS)

    assert consumers() == 0.0
    with subject.worker() as worker:
        wait_until(lambda: consumers() == 1.0, 60, "the worker")
        if CONSUMERS in subject.tells:
            kill(worker)
    wait_until(lambda: consumers() == 0.0, 60, "no worker")


def test_delayed_jobs_are_no_backlog(subject: Subject) -> None:
    """A job that is due later is delayed and not ready; one that is due and that nobody moved is ready, and ages."""
    needs(subject, DELAYED)
    polled = Polled(subject)
    subject.publish_later(3600)
    values = polled.values()
    assert (values[DELAYED], values[DEPTH], values[AGE]) == (1.0, 0.0, 0.0)
    if not subject.tells_due:
        return
    began = time.monotonic()
    subject.publish_later(-30)
    values = polled.values()
    assert (values[DELAYED], values[DEPTH]) == (1.0, 1.0)
    assert 28.5 <= values[AGE] <= 31.5 + time.monotonic() - began


def test_killed_workers_leave_no_drift(subject: Subject) -> None:
    """After a worker was killed within a job the depth is still the truth, and the next worker brings it to 0."""
    polled = Polled(subject)
    # After a kill Celery takes a few jobs from RabbitMQ at once and the next ten seconds later, without us as well.
    jobs = 4 if subject.system == "rabbitmq" else 20
    subject.publish(kind="hold")
    subject.publish(jobs)
    with subject.worker() as worker:
        wait_until(lambda: marks(subject.folder / "holding") == 1, 60, "the job to begin")
        assert polled.depth() == subject.truth() == jobs + subject.running_count
        kill(worker)
        wait_until(lambda: polled.depth() == subject.truth(), 60, "the broker to notice")
        assert polled.depth() in (jobs, jobs + 1), "the job that was lost is ready again, or with the broker"
    (subject.folder / "gate").touch()  # a job that comes again does not wait
    with subject.worker():
        wait_until(lambda: marks(subject.folder / "done") >= jobs, 60, "the other jobs")
        wait_until(lambda: polled.depth() == subject.truth() == 0, 60, "an empty queue")


def test_retries_leave_no_drift(subject: Subject) -> None:
    """A job that fails twice and is put back each time is gone when it is done."""
    polled = Polled(subject)
    subject.publish(kind="again")
    subject.publish(5)
    with subject.worker():
        wait_until(lambda: marks(subject.folder / "done") == 6, 60, "all six jobs")
        wait_until(lambda: polled.depth() == subject.truth() == 0, 60, "an empty queue")
    assert marks(subject.folder / "attempts") == 2


def test_workers_measure_waits_and_runs(subject: Subject) -> None:
    """A worker measures how long its jobs lay in this broker's queue and how they ended, under the broker's name."""
    if not subject.measures:
        pytest.skip("RQ's measured workers have tests of their own, plain Redis has no library to hook into")
    published = time.time()
    subject.publish(3)
    subject.publish(kind="fail")
    sleep_until(published + 0.5)
    store = subject.folder / "store"
    names = {"messaging_system": subject.system, "messaging_destination_name": "mail"}
    with subject.worker():
        wait_until(lambda: total(store, f"{catalog.PROCESS_DURATION.name}_count", **names) == 4.0, 60, "four runs")
        took = time.time() - published
    assert total(store, f"{catalog.PROCESS_DURATION.name}_count", **names, error_type="ValueError") == 1.0
    assert total(store, f"{catalog.QUEUE_WAIT.name}_count", **names) == 4.0
    assert 0.4 * 4 < total(store, f"{catalog.QUEUE_WAIT.name}_sum", **names) <= 4 * took


def test_a_purge_is_seen(subject: Subject) -> None:
    """After the operator has thrown the jobs away the depth is 0, and counts on from there."""
    polled = Polled(subject)
    subject.publish(50)
    subject.purge()
    assert polled.depth() == subject.truth() == 0
    subject.publish(7)
    assert polled.depth() == subject.truth() == 7


def test_several_sidecars_see_the_same_and_change_nothing(subject: Subject) -> None:
    """Two pollers of one broker tell the same series with the same values, and the jobs are still there."""
    subject.publish(5)
    first, second = Polled(subject), Polled(subject)
    for _ in range(3):
        began = time.monotonic()
        one, two = first.values(), second.values()
        assert one.keys() == two.keys() == subject.sees
        assert one[DEPTH] == two[DEPTH] == subject.truth() == 5
        ages = [values.pop(AGE, 0.0) for values in (one, two)]
        assert -0.01 <= ages[1] - ages[0] <= time.monotonic() - began + 0.01
        assert one == two


def test_a_broker_that_is_down_is_a_gap_and_comes_back(subject: Subject) -> None:
    """While the broker is down the queue is not up and has no rows, never a depth of 0; after its restart it is
    polled again without help, and the depth is the truth."""
    subject.publish(9)
    queue = PolledQueue(subject.url, interval=0.05)
    queue.start()
    try:
        wait_until(lambda: depth(queue) == 9.0, 60, "the depth")
        subject.forget()
        subject.server.stop()
        wait_until(lambda: queue.up is False, 60, "the failure")
        assert queue.rows() == []
        subject.server.start()
        subject.start() if subject.system == "redis" else None  # this Redis keeps nothing, RabbitMQ keeps its jobs
        expected = float(subject.truth())
        wait_until(lambda: depth(queue) == expected, 60, "the recovery")
        assert expected == (0.0 if subject.system == "redis" else 9.0)
    finally:
        queue.stop()
        if not subject.server.running:
            subject.server.start()


def depth(queue: PolledQueue) -> float | None:
    """Return the ready jobs of a polled queue, None while there are no rows."""
    found = [value for metric, _, value in queue.rows() if metric is DEPTH]
    return sum(found) if found else None
