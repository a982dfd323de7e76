"""Kafka in the kit of queues: a topic that one group reads, on the broker that librdkafka brings for tests."""

from __future__ import annotations

import json

import confluent_kafka

from demo_app.stack.process import wait_until
from fastapi_headroom import catalog
from tests.support.mock_kafka import MockKafka
from tests.support.queue_kit import PYTHON, Subject

DEPTH, AGE = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE


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
        committed = {it.partition: max(0, it.offset) for it in self._reader.committed(places, timeout=20)}
        ends = {it.partition: self._reader.get_watermark_offsets(it, timeout=20)[1] for it in places}
        return {number: (ends[number], committed[number]) for number in range(4)}

    def worker_command(self) -> list[str]:
        """Run our own worker."""
        return [PYTHON, "-m", "tests.support.queue_jobs", "kafka", self.address, self.topic, self.group]
