"""Dramatiq on Redis: a list of message ids per queue, and a hash with the messages that nobody has acknowledged yet.

Workers take ids from the list's left end, so LLEN is the depth and the id at 0 the oldest. The hash holds the ready
messages and those that workers fetched, in all: what it holds more than the list is in progress, which
includes what a worker has fetched ahead (twice its threads). A message of a worker that was killed counts there until
another worker puts it back, a minute after the last heartbeat by Dramatiq's defaults.

Delayed messages (and retries, which Dramatiq delays) lie in a queue of their own, ``NAME.DQ``, which workers load into
their memory; they stay in that queue's hash until they are due and were moved. Its size is ``headroom_queue_delayed``;
those that are due and that no worker moved cannot be told from the others. Dead letters are a sorted set.

The oldest age comes from the header that our publisher hook adds, else from the message's own timestamps: those do
not know of a delay, which counts as age then. A message in another encoding than JSON is aged from when it
was first seen as the oldest. Publishers send heartbeats like workers, so consumers cannot be counted.
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
from fastapi_headroom.probes.queue_adapters.times import READY_AT
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse_named

EXAMPLE: Final = "dramatiq+redis://host:6379/0?queues=default,mail"
NAMESPACE: Final = "dramatiq"
_TAIL = 65_536
"""Bytes at a message's end that are searched: options and timestamps come after the arguments."""
_READY = re.compile(rb'"%s": ?([0-9]+(?:\.[0-9]+)?)' % READY_AT.encode())
_STAMPS = re.compile(rb'"(?:requeue_timestamp|message_timestamp)": ?([0-9]{10,16})\b')


class DramatiqRedisPoller:
    """Reads depth, oldest age, delayed, fetched and dead messages of Dramatiq's queues."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url``."""
        self.name = url.name
        self._queues = url.queues
        self._prefix = url.parameters.get("namespace") or NAMESPACE
        self._link = RedisLink(url, EXAMPLE)
        self._oldest = OldestAges()

    @classmethod
    def from_url(cls, url: str) -> DramatiqRedisPoller:
        """Return the poller for ``dramatiq+redis://host:port/db?queues=a,b[&namespace=..]``."""
        return cls(parse_named(url, EXAMPLE, PORT, ("namespace",)))

    def poll(self) -> list[Sample]:
        """Return the state of every queue. Raises redis.RedisError."""
        questions: list[Command] = []
        for queue in self._queues:
            key = f"{self._prefix}:{queue}"
            questions += [
                ("MULTI",),  # a message that is fetched or acknowledged between two answers would be counted wrong
                ("LLEN", key),
                ("LINDEX", key, "0"),
                ("HLEN", f"{key}.msgs"),
                ("HLEN", f"{key}.DQ.msgs"),
                ("ZCARD", f"{key}.XQ"),
                ("EXEC",),
            ]
        states = [reply for reply in self._link.get(questions) if isinstance(reply, list)]
        ids = [(queue, state[1]) for queue, state in zip(self._queues, states, strict=True) if state[1] is not None]
        messages = self._link.get([("HGET", f"{self._prefix}:{queue}.msgs", first) for queue, first in ids])
        oldest = {queue: (first, message) for (queue, first), message in zip(ids, messages, strict=True)}
        now = time.time()
        samples: list[Sample] = []
        for queue, (ready, _, kept, delayed, dead) in zip(self._queues, states, strict=True):
            labels = (SYSTEM, queue, ALL)
            first, message = oldest.get(queue, (None, None))
            age = self._oldest.of(queue, first, functools.partial(ready_since, message), now)
            samples += [
                (catalog.QUEUE_DEPTH, labels, float(ready)),
                (catalog.QUEUE_IN_PROGRESS, labels, float(max(0, kept - ready))),
                (catalog.QUEUE_DELAYED, labels, float(delayed)),
                (catalog.QUEUE_FAILED, labels, float(dead)),
                (catalog.QUEUE_OLDEST_AGE, labels, age),
            ]
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


def ready_since(message: bytes | None) -> float | None:
    """Return since when a message could have been run (seconds since 1970), None where it does not tell.

    A large one is searched and not read: the last one of a name is the library's, for options come after the
    arguments and the message's own time at the end.
    """
    if message is None:
        return None
    if len(message) > _TAIL:
        tail = message[-_TAIL:]
        headers, stamps = _READY.findall(tail)[-1:], _STAMPS.findall(tail)[-2:]
    else:
        try:
            fields = json.loads(message)
            options = fields["options"] or {}
            headers = [options[READY_AT]] if READY_AT in options else []
            stamps = [fields["message_timestamp"], options.get("requeue_timestamp", 0)]
        except (ValueError, TypeError, LookupError):
            return None
    try:
        if headers:
            return float(headers[-1])
        return max(float(stamp) / 1000 for stamp in stamps) if stamps else None
    except (ValueError, TypeError):
        return None
