"""The kinds of queues that the kit is run with."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any, ClassVar

import amqp
import confluent_kafka
import kombu.pools
import redis
import rq

from demo_app.stack.process import wait_until
from demo_app.stack.servers import RabbitMQ, Redis
from fastapi_headroom import catalog
from tests.support import celery_app, queue_jobs
from tests.support.mock_kafka import MockKafka
from tests.support.queue_kit import PYTHON, Subject

DEPTH, AGE = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE
BUSY, CONSUMERS = catalog.QUEUE_IN_PROGRESS, catalog.QUEUE_CONSUMERS


class OnRedis(Subject):
    """What all queues on Redis share."""

    system = "redis"
    broker = Redis
    kind: ClassVar[str]

    @property
    def url(self) -> str:
        """The sidecar's URL."""
        return f"{self.kind}+{self.server.url}?queues=mail"  # type: ignore[attr-defined]

    @property
    def client(self) -> Any:
        """A client of the broker."""
        return redis.Redis.from_url(self.server.url)  # type: ignore[attr-defined]

    def start(self) -> None:
        """Begin with an empty Redis."""
        self.client.flushall()

    def purge(self) -> None:
        """Delete the queue's key."""
        self.client.delete("mail")


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
        """Declare the queue as Celery does, and empty it."""
        connect(self.server.url)  # type: ignore[attr-defined]
        with amqp.Connection(f"127.0.0.1:{self.server.port}") as connection:
            channel = connection.channel()
            channel.exchange_declare("mail", "direct", durable=True, auto_delete=False)
            channel.queue_declare("mail", durable=True, auto_delete=False)
            channel.queue_bind("mail", "mail", "mail")
            channel.queue_purge("mail")

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


class KafkaTopic(Subject):
    """A topic of four partitions, which one group reads."""

    system = "kafka"
    broker = MockKafka
    sees = frozenset({DEPTH, AGE})
    running_count = True
    topic = "mail"

    @property
    def group(self) -> str:
        """A group of each test's own: one that lost a member takes offsets from none but its members for seconds."""
        return f"billing-{self.folder.name}"[:80]

    @property
    def url(self) -> str:
        """The sidecar's URL."""
        return f"kafka://{self.address}?groups={self.group}&topics={self.topic}"

    @property
    def address(self) -> str:
        """Host and port."""
        return str(self.server.address)  # type: ignore[attr-defined]

    def start(self) -> None:
        """Make the topic by its first message, and let the group have read all that is there."""
        self.destination = f"{self.topic}/{self.group}"  # type: ignore[misc]
        self._producer = confluent_kafka.Producer({"bootstrap.servers": self.address, "log_level": "0"})
        self._reader = confluent_kafka.Consumer(
            {"bootstrap.servers": self.address, "group.id": self.group, "enable.auto.commit": "false",
             "log_level": "0"}
        )  # fmt: skip
        self.publish()
        self.purge()

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Produce: many to all partitions, few to one, where they keep their order."""
        for number in range(count):
            job = json.dumps({"folder": str(self.folder), "kind": kind})
            self._producer.produce(self.topic, job, partition=number % 4 if count >= 50 else 0)
        assert self._producer.flush(10) == 0

    def truth(self) -> int:
        """Ask for each partition's end and the group's offset, one by one."""
        return sum(high - committed for high, committed in self._places().values())

    def purge(self) -> None:
        """Set the group to the end, as an operator does."""
        places = self._places()
        wanted = [confluent_kafka.TopicPartition(self.topic, number, high) for number, (high, _) in places.items()]
        try:
            self._reader.commit(offsets=wanted, asynchronous=False)
        except confluent_kafka.KafkaException:
            # Once a group had members this broker takes offsets from a member only, which Kafka does while it has any.
            self._reader.subscribe([self.topic])
            wait_until(
                lambda: self._reader.poll(0.1) is not None or bool(self._reader.assignment()), 20, "to be a member"
            )
            self._reader.commit(offsets=wanted, asynchronous=False)
            self._reader.unsubscribe()

    def _places(self) -> dict[int, tuple[int, int]]:
        places = [confluent_kafka.TopicPartition(self.topic, number) for number in range(4)]
        committed = {it.partition: max(0, it.offset) for it in self._reader.committed(places, timeout=5)}
        ends = {it.partition: self._reader.get_watermark_offsets(it, timeout=5)[1] for it in places}
        return {number: (ends[number], committed[number]) for number in range(4)}

    def worker_command(self) -> list[str]:
        """Run our own worker."""
        return [PYTHON, "-m", "tests.support.queue_jobs", "kafka", self.address, self.topic, self.group]


SUBJECTS: tuple[type[Subject], ...] = (RedisList, RedisStream, RQ, CeleryOnRedis, CeleryOnRabbitMQ, KafkaTopic)
