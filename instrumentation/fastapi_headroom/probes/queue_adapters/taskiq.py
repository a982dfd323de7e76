"""TaskIQ on Redis: the lists of ``ListQueueBroker`` and the streams of ``RedisStreamBroker``, told apart by asking.

A list is pushed at the left and popped at the right, and a worker takes a message for good: its length is the depth
and there is no more to see. The age of the message at its end comes from the label that our publisher hook adds; one
from a publisher without it is aged from when it was first seen there.

A stream is read by one consumer group (``taskiq``, or ``group=``), whose lag and pending entries are depth
and jobs in progress (see ``redis_streams``); a worker fetches up to ``xread_count`` entries ahead, which count as in
progress. What the broker is asked to run later lies with TaskIQ's scheduler, and failed tasks with the
result backend: no series.
"""

from __future__ import annotations

import functools
import json
import re
import time
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.oldest import OldestAges
from fastapi_headroom.probes.queue_adapters.redis_link import ALL, PORT, SYSTEM, Command, RedisLink
from fastapi_headroom.probes.queue_adapters.redis_streams import RedisStreamPoller
from fastapi_headroom.probes.queue_adapters.times import READY_AT
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse

EXAMPLE: Final = "taskiq+redis://host:6379/0?queues=taskiq"
DEFAULT_QUEUE: Final = "taskiq"
DEFAULT_GROUP: Final = "taskiq"
_HEAD = 65_536
"""Bytes at a message's begin that are searched: labels come before the arguments."""
_READY = re.compile(rb'"%s": ?"?([0-9]+(?:\.[0-9]+)?)' % READY_AT.encode())


class TaskiqRedisPoller:
    """Reads depth and oldest age of TaskIQ's queues, and of streams the entries in progress."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url``, or TaskIQ's default one where it names none."""
        self.name = url.name
        self._queues = url.queues or (DEFAULT_QUEUE,)
        self._group = url.parameters.get("group") or DEFAULT_GROUP
        self._link = RedisLink(url, EXAMPLE)
        self._streams = RedisStreamPoller(url, self._link)
        self._oldest = OldestAges()

    @classmethod
    def from_url(cls, url: str) -> TaskiqRedisPoller:
        """Return the poller for ``taskiq+redis://host:port/db[?queues=a,b][&group=..]``."""
        return cls(parse(url, EXAMPLE, PORT, ("group",)))

    def poll(self) -> list[Sample]:
        """Return the state of every queue. Raises redis.RedisError."""
        kinds = self._link.get([("TYPE", queue) for queue in self._queues])
        streams = tuple(queue for queue, kind in zip(self._queues, kinds, strict=True) if kind == b"stream")
        lists = [queue for queue in self._queues if queue not in streams]
        samples = self._lists(lists)
        for metric, (_, name, _), value in self._streams.poll_streams(streams) if streams else ():
            stream, _, group = name.rpartition("/")
            if group == self._group:
                samples.append((metric, (SYSTEM, stream, ALL), value))
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def _lists(self, queues: list[str]) -> list[Sample]:
        questions: list[Command] = []
        for queue in queues:
            questions += [("LLEN", queue), ("LINDEX", queue, "-1")]
        replies = iter(self._link.get(questions))
        now = time.time()
        samples: list[Sample] = []
        for queue, length, message in zip(queues, replies, replies, strict=False):
            job = None if message is None else hash(message)
            age = self._oldest.of(queue, job, functools.partial(ready_since, message), now)
            samples.append((catalog.QUEUE_DEPTH, (SYSTEM, queue, ALL), float(length)))
            samples.append((catalog.QUEUE_OLDEST_AGE, (SYSTEM, queue, ALL), age))
        return samples


def ready_since(message: bytes) -> float | None:
    """Return since when a message could have been run (seconds since 1970), None where it does not tell.

    A large one is searched and not read: the first match is the label, for labels come before the arguments.
    """
    try:
        if len(message) > _HEAD:
            found = _READY.search(message, 0, _HEAD)
            return float(found[1]) if found else None
        return float(json.loads(message)["labels"][READY_AT])
    except (ValueError, TypeError, LookupError):
        return None
