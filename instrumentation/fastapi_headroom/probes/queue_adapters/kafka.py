"""Kafka: how far consumer groups are behind the end of the topics that they read.

A topic is a log, so a group of a topic is the queue, named ``topic/group``. Its depth is the lag: the end of each
partition less the group's committed offset, summed up. A message counts until its offset is committed, so those that
a consumer works on count too; what was deleted by retention before the group read it does not. A partition for which
the group has committed nothing counts from its beginning, as with ``auto.offset.reset=earliest``; a group that has
committed nothing in a topic has no series for it.

The oldest age comes from the timestamp of the next message of each partition that is behind. It is fetched without
joining the group, and only when the group has moved since: a group that is stuck costs no fetch. A fetch is of one
message as far as Kafka goes, which is one batch of the producer's.

Who is in a group, and what is being worked on, has no series.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.errors import MissingExtraError, SettingsError
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.url import parse

EXAMPLE: Final = "kafka://host:9092?groups=billing,mail&topics=orders"
PORT: Final = 9092
SYSTEM: Final = "kafka"
ALL: Final = "_all"
TIMEOUT: Final = 5.0
"""Seconds to wait for a reply."""
LOOKS: Final = 64
"""Partitions of a group whose next message is fetched in one poll; of a group with more that are behind there is no
age."""
LOOK_SECONDS: Final = 3.0
"""Seconds that one poll may spend on such messages."""
_BYTES: Final = "1024"
"""Bytes to fetch per partition; Kafka sends a larger message all the same."""
_COMMON: Final = {
    "enable.auto.offset.store": "false",
    "enable.auto.commit": "false",
    "log_level": "0",
    "allow.auto.create.topics": "false",
}

Place = tuple[str, int]
"""A partition: topic and number."""


class KafkaPoller:
    """Reads lag and oldest age of consumer groups. It joins no group and commits nothing."""

    def __init__(self, url: str, groups: tuple[str, ...], topics: tuple[str, ...], properties: dict[str, str]) -> None:
        """Prepare to poll (no connection is made yet). Raises MissingExtraError without confluent-kafka."""
        try:
            import confluent_kafka
            from confluent_kafka import admin
        except ImportError as error:
            raise MissingExtraError("confluent-kafka", "kafka", "Polling Kafka") from error
        self._kafka: Any = confluent_kafka
        self._admin_module: Any = admin
        self.name = f"kafka://{url}"
        self._groups, self._topics = groups, topics
        self._config = {**properties, **_COMMON, "bootstrap.servers": url}
        self._members: dict[str, Any] = {}
        self._admin: Any = None
        self._looker: Any = None
        self._seen: dict[tuple[str, Place], tuple[int, float | None]] = {}

    @classmethod
    def from_url(cls, url: str) -> KafkaPoller:
        """Return the poller for ``kafka://host:port?groups=a,b&topics=c,d[&properties=FILE]``.

        The file holds properties of librdkafka, one ``name=value`` a line: TLS and passwords belong there.
        """
        parsed = parse(url, EXAMPLE, PORT, ("groups", "topics", "properties"))
        groups, topics = (
            tuple(dict.fromkeys(filter(None, parsed.parameters.get(name, "").split(","))))
            for name in ("groups", "topics")
        )
        if not groups or not topics or parsed.queues:
            raise SettingsError(f"a Kafka queue URL names groups and topics, and no queues; it looks like {EXAMPLE}")
        address = parsed.name.partition("://")[2].partition("/")[0]
        if "@" in url.partition("?")[0]:
            raise SettingsError(
                "a Kafka queue URL holds no password: put sasl.username and sasl.password into a file of librdkafka "
                f"properties and name it, as in {EXAMPLE}&properties=/etc/kafka.properties"
            )
        return cls(address, groups, topics, _properties(parsed.parameters.get("properties", "")))

    def poll(self) -> list[Sample]:
        """Return lag and oldest age of each group in each topic. Raises confluent_kafka.KafkaException or
        TimeoutError when Kafka does not answer."""
        try:
            return self._poll()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections. Idempotent; the next poll opens them again."""
        clients, self._members, self._looker, self._admin = [*self._members.values(), self._looker], {}, None, None
        for client in clients:
            if client is not None:
                client.close()

    def _poll(self) -> list[Sample]:
        places = self._partitions()
        committed = {group: self._committed(group, places) for group in self._groups}
        spec = self._admin_module.OffsetSpec
        begins, ends = self._offsets(places, spec.earliest()), self._offsets(places, spec.latest())
        samples: list[Sample] = []
        for group, offsets in committed.items():
            for topic in self._topics:
                here = [place for place in places if place[0] == topic]
                if not any(offsets[place] is not None for place in here):
                    continue
                at = {place: max(offsets[place] or 0, begins[place]) for place in here}
                lags = {place: max(0, ends[place] - at[place]) for place in here}
                labels = (SYSTEM, f"{topic}/{group}", ALL)
                samples.append((catalog.QUEUE_DEPTH, labels, float(sum(lags.values()))))
                age = self._age(group, {place: at[place] for place, lag in lags.items() if lag})
                if age is not None:
                    samples.append((catalog.QUEUE_OLDEST_AGE, labels, age))
        return samples

    def _partitions(self) -> list[Place]:
        """Return the partitions of the topics that exist. Raises KafkaException for other troubles with one."""
        found: list[Place] = []
        for topic in self._topics:
            told = self._member(self._groups[0]).list_topics(topic, timeout=TIMEOUT).topics[topic]
            if told.error is None:
                found += [(topic, number) for number in sorted(told.partitions)]
            elif told.error.code() != self._kafka.KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise self._kafka.KafkaException(told.error)
        return found

    def _committed(self, group: str, places: list[Place]) -> dict[Place, int | None]:
        wanted = [self._kafka.TopicPartition(*place) for place in places]
        if not wanted:
            return {}
        told = self._member(group).committed(wanted, timeout=TIMEOUT)
        return {(it.topic, it.partition): it.offset if it.offset >= 0 else None for it in told}

    def _offsets(self, places: list[Place], spec: Any) -> dict[Place, int]:
        wanted = {self._kafka.TopicPartition(*place): spec for place in places}
        if not wanted:
            return {}
        if self._admin is None:
            self._admin = self._admin_module.AdminClient(
                {name: value for name, value in self._config.items() if name not in _COMMON or name == "log_level"}
            )
        told = self._admin.list_offsets(wanted, request_timeout=TIMEOUT)
        return {(it.topic, it.partition): future.result(TIMEOUT + 1).offset for it, future in told.items()}

    def _age(self, group: str, behind: dict[Place, int]) -> float | None:
        """Return how long ago the oldest of the next messages was written; 0 with none, None where that is unknown."""
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != group or key[1] in behind}
        if len(behind) > LOOKS:
            return None
        moved = {place: at for place, at in behind.items() if self._seen.get((group, place), (-1, None))[0] != at}
        for place, written in self._look(moved).items():
            self._seen[group, place] = (moved[place], written)
        times = [self._seen[group, place][1] if (group, place) in self._seen else None for place in behind]
        known = [written for written in times if written is not None]
        if len(known) < len(times):
            return None
        return max(0.0, time.time() - min(known)) if known else 0.0

    def _look(self, places: dict[Place, int]) -> dict[Place, float | None]:
        """Fetch the message at each offset; return when it was written (seconds since 1970)."""
        found: dict[Place, float | None] = {}
        if not places:
            return found
        if self._looker is None:
            options = {"group.id": self._groups[0], "max.partition.fetch.bytes": _BYTES, "queued.min.messages": "1"}
            options |= {"queued.max.messages.kbytes": "1", "fetch.wait.max.ms": "50"}
            self._looker = self._kafka.Consumer({**self._config, **options})
        self._looker.assign([self._kafka.TopicPartition(*place, at) for place, at in places.items()])
        try:
            deadline = time.monotonic() + LOOK_SECONDS
            while len(found) < len(places) and (left := deadline - time.monotonic()) > 0:
                message = self._looker.poll(left)
                if message is not None and message.error() is None:
                    kind, milliseconds = message.timestamp()
                    known = kind != self._kafka.TIMESTAMP_NOT_AVAILABLE
                    found.setdefault((message.topic(), message.partition()), milliseconds / 1000 if known else None)
        finally:
            self._looker.unassign()
        return found

    def _member(self, group: str) -> Any:
        """Return a client that asks in a group's name; it never subscribes, so it is no member of it."""
        if group not in self._members:
            self._members[group] = self._kafka.Consumer({**self._config, "group.id": group})
        return self._members[group]


def _properties(file: str) -> dict[str, str]:
    """Read a file of properties. Raises SettingsError when it cannot be read; its text is in no error."""
    if not file:
        return {}
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(f"the Kafka properties file cannot be read ({type(error).__name__})") from None
    pairs = (line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}
