"""Kafka beyond the kit: on the broker that librdkafka brings along for tests."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from demo_app.stack.process import wait_until
from fastapi_headroom import catalog
from fastapi_headroom.errors import MissingExtraError, SettingsError
from fastapi_headroom.exporter.pollers import PolledQueue
from fastapi_headroom.probes.queue_adapters import poller_for
from tests.support.mock_kafka import MockKafka

DEPTH, AGE = catalog.QUEUE_DEPTH.name, catalog.QUEUE_OLDEST_AGE.name


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockKafka]:
    """A broker."""
    with MockKafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server


def produce(broker: MockKafka, topic: str, count: int, partition: int = 0, age: float = 0.0) -> None:
    """Write messages that are said to be so many seconds old."""
    producer = Producer({"bootstrap.servers": broker.address, "log_level": "0"})
    for _ in range(count):
        producer.produce(topic, b"x" * 5_000, partition=partition, timestamp=int((time.time() - age) * 1000))
    assert producer.flush(10) == 0


def commit(broker: MockKafka, group: str, topic: str, **offsets: int) -> None:
    """Set a group's offsets, as an operator does; ``p1=5`` is partition 1."""
    client = Consumer({"bootstrap.servers": broker.address, "group.id": group, "log_level": "0"})
    places = [TopicPartition(topic, int(name[1:]), offset) for name, offset in offsets.items()]
    client.commit(offsets=places, asynchronous=False)
    client.close()


def poll(broker: MockKafka, parameters: str) -> dict[tuple[str, str], float]:
    """Return one poll's values by metric name and destination."""
    poller = poller_for(f"kafka://{broker.address}?{parameters}")
    try:
        return {(metric.name, labels[1]): value for metric, labels, value in poller.poll()}
    finally:
        poller.close()


def test_each_group_of_each_topic_is_a_queue(broker: MockKafka) -> None:
    """Groups are behind each by its own offsets; a group that never committed in a topic and a topic that is not there
    have no series, and a partition without a commit counts from its beginning."""
    produce(broker, "orders", 10, partition=0)
    produce(broker, "orders", 5, partition=3)
    produce(broker, "refunds", 2)
    commit(broker, "fast", "orders", p0=10, p3=4)
    commit(broker, "slow", "orders", p0=3)
    values = poll(broker, "groups=fast,slow,new&topics=orders,refunds,none")
    assert {queue: value for (name, queue), value in values.items() if name == DEPTH} == {
        "orders/fast": 1.0,
        "orders/slow": 12.0,
    }


def test_the_age_is_that_of_the_oldest_message_that_was_not_read(broker: MockKafka) -> None:
    """Over all partitions the oldest next message counts; it is followed as the group moves, and 0 at the end."""
    began = time.monotonic()
    produce(broker, "aged", 1, partition=0, age=100)
    produce(broker, "aged", 1, partition=0, age=50)
    produce(broker, "aged", 1, partition=1, age=70)
    poller = poller_for(f"kafka://{broker.address}?groups=g&topics=aged")

    def age() -> float:
        found: list[float] = []

        def told() -> bool:  # a message that is not fetched within a second leaves the age out of that poll
            found.extend(value for metric, _, value in poller.poll() if metric.name == AGE)
            return bool(found)

        wait_until(told, 60, "an age")
        return found[0]

    for offsets, expected in (({"p0": 0}, 100), ({"p0": 1}, 70), ({"p0": 1, "p1": 1}, 50)):
        commit(broker, "g", "aged", **offsets)
        for _ in range(2):
            assert expected - 0.1 <= age() <= expected + time.monotonic() - began + 0.1
    commit(broker, "g", "aged", p0=2, p1=1)
    assert age() == 0.0
    poller.close()


def test_two_pollers_disturb_neither_each_other_nor_the_group(broker: MockKafka) -> None:
    """Polling joins no group and moves no offset, whatever a file of properties says."""
    produce(broker, "quiet", 4)
    commit(broker, "g", "quiet", p0=1)
    first, second = (poll(broker, "groups=g&topics=quiet") for _ in range(2))
    assert first[DEPTH, "quiet/g"] == second[DEPTH, "quiet/g"] == 3.0
    client = Consumer({"bootstrap.servers": broker.address, "group.id": "g", "log_level": "0"})
    (place,) = client.committed([TopicPartition("quiet", 0)], timeout=5)
    assert place.offset == 1
    client.close()


def test_properties_are_read_from_a_file(broker: MockKafka, tmp_path: Path) -> None:
    """A file's properties reach the client: with TLS asked for, a broker without it cannot be polled."""
    produce(broker, "tls", 1)
    commit(broker, "g", "tls", p0=0)
    file = tmp_path / "kafka.properties"
    file.write_text("# as librdkafka names them\nenable.auto.commit = true\n")
    assert poll(broker, f"groups=g&topics=tls&properties={file}")[DEPTH, "tls/g"] == 1.0
    file.write_text("security.protocol=ssl\n")
    with pytest.raises(KafkaException):
        poll(broker, f"groups=g&topics=tls&properties={file}")


def test_a_broker_that_ends_is_a_gap(tmp_path: Path) -> None:
    """When the broker is gone for good its queues are not up and have no rows, never a depth of 0."""
    with MockKafka(tmp_path) as own:
        produce(own, "mail", 3)
        commit(own, "g", "mail", p0=0)
        queue = PolledQueue(f"kafka://{own.address}?groups=g&topics=mail", interval=0.05)
        queue.start()
        wait_until(lambda: [v for m, _, v in queue.rows() if m.name == DEPTH] == [3.0], 60, "the depth")
        own.kill()
        wait_until(lambda: queue.up is False, 60, "the failure")
        assert queue.rows() == []
        queue.stop()


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("kafka://host:9092?groups=g", "names groups and topics"),
        ("kafka://host:9092?topics=t", "names groups and topics"),
        ("kafka://host:9092?groups=g&topics=t&queues=q", "no queues"),
        ("kafka://user:secret@host:9092?groups=g&topics=t", "sasl.password into a file"),
        ("kafka://host:9092?groups=g&topics=t&properties=/secret/none", "cannot be read (FileNotFoundError)"),
    ],
)
def test_a_url_that_cannot_be_used_names_the_remedy(url: str, remedy: str) -> None:
    """A wrong queue URL is one clear error that holds no credentials."""
    with pytest.raises(SettingsError, match=re.escape(remedy)) as caught:
        poller_for(url)
    assert "secret" not in str(caught.value)


def test_polling_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without confluent-kafka the error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "confluent_kafka", None)
    with pytest.raises(MissingExtraError, match=r"fastapi-headroom\[kafka\]"):
        poller_for("kafka://host:9092?groups=g&topics=t")
