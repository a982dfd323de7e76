"""What the queue kit asks of each kind of queue: a real broker, real workers, and the truth to compare with."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from demo_app.stack.process import Process
from demo_app.stack.servers import Server
from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.queue_adapters import Poller, poller_for
from fastapi_headroom.store.reader import Reader
from tests.support.serving import ROOT


class Subject(ABC):
    """One kind of queue with one queue called ``mail``, which ``start`` makes or empties."""

    system: ClassVar[str]
    destination: ClassVar[str] = "mail"
    depth_is: ClassVar[str] = "_all"
    """``priority`` label of the jobs that the kit publishes."""
    sees: ClassVar[frozenset[Metric]]
    """The rows that its poller writes; the rows of other states must never show up."""

    grace: ClassVar[float] = 3.0
    """Seconds for a worker to end in order: a Celery worker without heartbeats may sleep on its socket."""
    tells_due: ClassVar[bool] = True
    """Whether delayed jobs that are due and that nobody moved are told from the others."""
    tells: ClassVar[frozenset[Metric]] = frozenset()
    """The rows that its workers write in the poller's place, into ``store`` in the folder."""

    running_count: ClassVar[bool] = False
    """Whether a job counts as ready until it is done: in a log only what is committed is behind the group."""

    measures: ClassVar[bool] = False
    """Whether the kit's worker measures its jobs, into ``store`` in the folder."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL that the sidecar is given."""

    @abstractmethod
    def start(self) -> None:
        """Make the queue, empty."""

    @abstractmethod
    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Enqueue jobs as an app does, one after the other; they are in the broker at the return."""

    @abstractmethod
    def truth(self) -> int:
        """Return how many jobs are ready, as the library or the broker tells."""

    @abstractmethod
    def purge(self) -> None:
        """Throw all ready jobs away, as an operator does."""

    @abstractmethod
    def worker_command(self) -> list[str]:
        """Return the command of a worker that runs one job at a time."""

    def publish_later(self, seconds: float) -> None:
        """Enqueue a job that is due later; only where delayed jobs are seen."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop connections, before the broker goes; most have none that last."""
        return

    @contextlib.contextmanager
    def worker(self) -> Iterator[Process]:
        """Run a worker until the end of the block, also one that waits for the gate."""
        process = Process(
            "worker",
            self.worker_command(),
            log=self.folder / "worker.log",
            cwd=ROOT,
            env=self.environment(),
            grace=self.grace,
        )
        process.start()
        try:
            yield process
        except (AssertionError, TimeoutError) as error:
            error.add_note(f"{process.tail(30)}\n{self.truth()} jobs are ready")
            raise
        finally:
            (self.folder / "gate").touch()
            process.stop()

    def environment(self) -> dict[str, str]:
        """Return the environment of a worker."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "instrumentation")]
            ),
            "C_FORCE_ROOT": "1",
            "HEADROOM_DIRECTORY": str(self.folder / "store"),
        }


class Polled:
    """Polls a subject and reads single values."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.poller: Poller = poller_for(subject.url)

    def values(self) -> dict[Metric, float]:
        """Return one poll's values of the kit's queue, priorities summed up (ages: the highest)."""
        found: dict[Metric, float] = {}
        for metric, (system, queue, _), value in self.poller.poll():
            assert system == self.subject.system
            if queue not in (self.subject.destination, "_all"):
                continue
            together: Callable[..., float] = max if metric is catalog.QUEUE_OLDEST_AGE else lambda *two: sum(two)
            found[metric] = together(found.get(metric, 0.0), value)
        return found

    def __call__(self, metric: Metric) -> float:
        """Return one value of a poll of now."""
        return self.values()[metric]

    def depth(self) -> float:
        """Return the ready jobs."""
        return self(catalog.QUEUE_DEPTH)

    def between(self, read: Callable[[], Any]) -> tuple[Any, float, Any]:
        """Return the truth just before a poll, its depth, and the truth just after."""
        before = read()
        return before, self.depth(), read()


def total(directory: Path, sample: str, **labels: str) -> float:
    """Return the sum of one sample of a store over all label sets that hold ``labels``."""
    if not directory.is_dir():
        return 0.0
    return sum(
        value
        for family in Reader(directory).read().families
        for name, pairs, value in family.samples
        if name == sample and labels.items() <= dict(pairs).items()
    )


def kill(process: Process) -> None:
    """End a worker and all of its group as ``kill -9`` does, and wait until it is gone."""
    assert process.child is not None
    os.killpg(process.child.pid, signal.SIGKILL)
    process.stop()


def sleep_until(moment: float) -> None:
    """Sleep until so many seconds since 1970: the kit's schedules are made of known times."""
    time.sleep(max(0.0, moment - time.time()))


PYTHON = sys.executable
