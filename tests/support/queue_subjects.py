"""The kinds of queues that the kit is run with."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import amqp
import kombu.pools
import rq

from demo_app.stack.process import Process, wait_until
from demo_app.stack.servers import RabbitMQ
from fastapi_headroom import catalog
from tests.support import celery_app, queue_jobs
from tests.support.dramatiq_subjects import DramatiqOnRabbitMQ, DramatiqOnRedis
from tests.support.kafka_subject import KafkaTopic
from tests.support.queue_kit import PYTHON, Subject
from tests.support.queue_rabbitmq import remove_queues
from tests.support.queue_redis import OnRedis
from tests.support.taskiq_subjects import TaskiqList, TaskiqOnRabbitMQ, TaskiqStream

DEPTH, AGE = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE
BUSY, CONSUMERS = catalog.QUEUE_IN_PROGRESS, catalog.QUEUE_CONSUMERS


class RedisList(OnRedis):
    """A plain list, pushed at the left and popped at the right."""

    kind = "list"
    sees = frozenset({DEPTH, AGE})

    @property
    def url(self) -> str:
        """The sidecar's URL, which names the field with the time."""
        return f"{super().url}&timestamp=enqueued_at"

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Push."""
        for _ in range(count):
            job = {"folder": str(self.folder), "kind": kind, "enqueued_at": time.time()}
            self.client.lpush("mail", json.dumps(job))

    def truth(self) -> int:
        """Count the items one by one."""
        return len(self.client.lrange("mail", 0, -1))

    def worker_command(self) -> list[str]:
        """Run our own worker."""
        return [PYTHON, "-m", "tests.support.queue_jobs", self.kind, self.server.url, "mail"]  # type: ignore[attr-defined]


class RedisStream(OnRedis):
    """A stream with one consumer group."""

    kind = "stream"
    destination = f"mail/{queue_jobs.GROUP}"
    sees = frozenset({DEPTH, AGE, BUSY})

    def start(self) -> None:
        """Make stream and group."""
        super().start()
        self.client.xgroup_create("mail", queue_jobs.GROUP, id="0", mkstream=True)

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Add entries."""
        for _ in range(count):
            self.client.xadd("mail", {"folder": str(self.folder), "kind": kind})

    def truth(self) -> int:
        """Count the entries behind the last one that was delivered one by one."""
        (group,) = self.client.xinfo_groups("mail")
        return len(self.client.xrange("mail", min=f"({group['last-delivered-id'].decode()}"))

    def purge(self) -> None:
        """Trim the stream to nothing."""
        self.client.xtrim("mail", maxlen=0, approximate=False)

    worker_command = RedisList.worker_command


class RQ(OnRedis):
    """RQ with its own worker."""

    kind = "rq"
    grace = 10.0  # it leaves the list of workers at its end
    sees = frozenset({DEPTH, AGE, BUSY, CONSUMERS, catalog.QUEUE_DELAYED, catalog.QUEUE_FAILED})

    @property
    def queue(self) -> Any:
        """RQ's queue."""
        return rq.Queue("mail", connection=self.client)

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Enqueue; a job may be tried three times."""
        for _ in range(count):
            retry = rq.Retry(max=2) if kind == "again" else None
            self.queue.enqueue(queue_jobs.run, str(self.folder), kind, retry=retry)

    def publish_later(self, seconds: float) -> None:
        """Schedule."""
        self.queue.enqueue_in(timedelta(seconds=seconds), queue_jobs.run, str(self.folder))

    def truth(self) -> int:
        """Ask RQ for the ids of the jobs."""
        return len(self.queue.get_job_ids())

    def purge(self) -> None:
        """Empty the queue as ``rq empty`` does."""
        self.queue.empty()

    @contextlib.contextmanager
    def worker(self) -> Iterator[Process]:
        """Run a worker; end it only once it listens: RQ puts it on the list before it heeds signals."""
        with super().worker() as process:
            yield process
            if process.running:
                wait_until(self._all_listen, 60, "the worker to heed signals")

    def _all_listen(self) -> bool:
        return all(worker.get_state() in ("idle", "busy") for worker in rq.Worker.all(connection=self.client))

    def worker_command(self) -> list[str]:
        """Run RQ's worker, which forks a work-horse for each job."""
        return [PYTHON, "-m", "rq.cli", "worker", "--quiet", "--url", self.server.url, "mail"]  # type: ignore[attr-defined]


class CeleryOnRedis(OnRedis):
    """Celery with its own worker."""

    kind = "celery"
    measures = True
    sees = frozenset({DEPTH, AGE, BUSY})
    tells = frozenset({CONSUMERS})

    def start(self) -> None:
        """Point the app at this broker."""
        super().start()
        connect(self.server.url)  # type: ignore[attr-defined]

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Send tasks."""
        for _ in range(count):
            celery_app.kit.apply_async((str(self.folder), kind))

    def truth(self) -> int:
        """Count the items of all priorities one by one."""
        return sum(len(self.client.lrange(key, 0, -1)) for key in self.client.keys("mail*"))

    def purge(self) -> None:
        """Purge as ``celery purge`` does."""
        celery_app.app.control.purge()

    def forget(self) -> None:
        """Close Celery's pools: their connections would break with the broker."""
        disconnect()

    def environment(self) -> dict[str, str]:
        """Point the worker at this broker."""
        return super().environment() | {"TEST_BROKER_URL": self.server.url}  # type: ignore[attr-defined]

    def worker_command(self) -> list[str]:
        """Run Celery's worker, one job at a time in its own process."""
        return [
            PYTHON, "-m", "celery", "-A", "tests.support.celery_app", "worker", "--pool", "solo", "-c", "1",
            "-Q", "mail", "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "warning",
        ]  # fmt: skip


class CeleryOnRabbitMQ(CeleryOnRedis):
    """The same on RabbitMQ."""

    system = "rabbitmq"
    broker = RabbitMQ  # type: ignore[assignment]
    sees = frozenset({DEPTH, CONSUMERS})
    tells = frozenset()

    def start(self) -> None:
        """Declare the queue anew as Celery does."""
        remove_queues(self.server.port, "mail")
        connect(self.server.url)  # type: ignore[attr-defined]
        with amqp.Connection(f"127.0.0.1:{self.server.port}") as connection:
            channel = connection.channel()
            channel.exchange_declare("mail", "direct", durable=True, auto_delete=False)
            channel.queue_declare("mail", durable=True, auto_delete=False)
            channel.queue_bind("mail", "mail", "mail")

    def truth(self) -> int:
        """Ask Celery's own connection."""
        with celery_app.app.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare("mail", passive=True).message_count)


def connect(url: str) -> None:
    """Make the test app publish to this broker, over new connections."""
    disconnect()
    celery_app.app.conf.broker_url = url
    celery_app.app.conf.broker_transport_options = celery_app.transport_options(url)


def disconnect() -> None:
    """Let the test app connect anew: Celery and kombu each keep a pool."""
    celery_app.app._after_fork()
    kombu.pools.reset()


SUBJECTS: tuple[type[Subject], ...] = (
    RedisList, RedisStream, RQ, CeleryOnRedis, CeleryOnRabbitMQ, DramatiqOnRedis, DramatiqOnRabbitMQ,
    TaskiqList, TaskiqStream, KafkaTopic,
)  # fmt: skip
if find_spec("arq"):  # in an environment of its own: see tests/arq.txt
    from tests.support.arq_subject import Arq

    SUBJECTS += (Arq,)

SLOW: tuple[type[Subject], ...] = (TaskiqOnRabbitMQ,)
"""Kinds whose poller is that of another kind, run by ``make soak``."""
