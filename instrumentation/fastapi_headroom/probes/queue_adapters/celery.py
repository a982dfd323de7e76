"""Celery on Redis: how many jobs are ready, and how long the oldest one has been waiting.

kombu keeps one Redis list per queue and priority step (``mail``, ``mail\\x06\\x163``, ...), pushes at the left and
pops at the right, so LLEN is the depth and the item at -1 is the oldest. Every poll is two round trips of O(1)
commands on one connection: the lengths, then the last item of each list that is not empty.

The oldest job's age comes from the header that our publisher hook adds, or from the job's ``eta`` where that is
later. A job from a publisher without the hook is timed from when this poller first saw it as the oldest.

Jobs with an ``eta`` lie in the list until a worker fetches them and are counted there until then; a worker keeps
them in the hash of unacknowledged messages, where they cannot be told from others without reading all of it. So
delayed jobs have no series here, and ``headroom_queue_in_progress`` is one series for all queues of
the database (destination and priority ``_all``): jobs that workers have fetched and not acknowledged, delayed
ones too. Celery acknowledges a job when it starts, unless ``acks_late`` is set, so running ones count only then.
"""

from __future__ import annotations

import functools
import re
import time
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.oldest import OldestAges
from fastapi_headroom.probes.queue_adapters.redis_link import ALL, PORT, SYSTEM, RedisLink
from fastapi_headroom.probes.queue_adapters.times import parse_time
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse_named

ENQUEUED_AT: Final = "headroom_enqueued_at"
"""Message header with the time of publishing, in seconds since 1970."""
PRIORITY_STEPS: Final[tuple[int, ...]] = (0, 3, 6, 9)
"""kombu's default ``priority_steps``."""
SEPARATOR: Final = "\x06\x16"
_EXAMPLE = "celery+redis://host:6379/0?queues=mail,reports&priorities=0,3,6,9"
_TAIL = 65_536
"""Bytes at a message's end that are searched: kombu writes the body first, then the headers."""
_ENQUEUED = re.compile(rb'"%s": ?([0-9]+(?:\.[0-9]+)?)' % ENQUEUED_AT.encode())
_ETA = re.compile(rb'"eta": ?"([0-9T:.+Z -]+)"')


class CeleryRedisPoller:
    """Reads depth and oldest age of Celery queues on Redis over one connection of its own."""

    def __init__(self, url: QueueURL, steps: tuple[int, ...]) -> None:
        """Prepare to poll the queues of ``url`` (no connection is made yet)."""
        self.name = url.name
        namespace = url.parameters.get("namespace", "")
        self._lists = [
            (queue, str(step), f"{namespace}{queue}{SEPARATOR}{step}" if step else f"{namespace}{queue}")
            for queue in url.queues
            for step in steps
        ]
        self._unacked = f"{namespace}unacked"
        self._link = RedisLink(url, _EXAMPLE)
        self._oldest = OldestAges()

    @classmethod
    def from_url(cls, url: str) -> CeleryRedisPoller:
        """Return the poller for ``celery+redis://[user:password@]host:port/db?queues=a,b[&priorities=..][&namespace=..]``.

        ``priorities`` are kombu's ``priority_steps``, ``namespace`` its ``global_keyprefix``.
        """
        parsed = parse_named(url, _EXAMPLE, PORT, ("priorities", "namespace"))
        steps = PRIORITY_STEPS
        if text := parsed.parameters.get("priorities"):
            if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
                raise SettingsError(f"queue URL has priorities={text!r}; priorities are numbers, such as 0,3,6,9")
            steps = tuple(sorted({int(step) for step in text.split(",")}))
        return cls(parsed, steps)

    def poll(self) -> list[Sample]:
        """Return depth and oldest age per queue and priority, and the jobs in progress. Raises redis.RedisError."""
        *lengths, unacked = self._link.get([*(("LLEN", key) for *_, key in self._lists), ("HLEN", self._unacked)])
        waiting = [key for (*_, key), length in zip(self._lists, lengths, strict=True) if length]
        oldest = dict(zip(waiting, self._link.get([("LINDEX", key, "-1") for key in waiting]), strict=True))
        now = time.time()
        samples: list[Sample] = [(catalog.QUEUE_IN_PROGRESS, (SYSTEM, ALL, ALL), float(unacked))]
        for (queue, priority, key), length in zip(self._lists, lengths, strict=True):
            labels = (SYSTEM, queue, priority)
            samples.append((catalog.QUEUE_DEPTH, labels, float(length)))
            message = oldest.get(key)
            job = None if message is None else hash(message)
            age = self._oldest.of(key, job, functools.partial(ready_since, message), now)
            samples.append((catalog.QUEUE_OLDEST_AGE, labels, age))
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


def ready_since(message: bytes | None) -> float | None:
    """Return since when a message could have been run (seconds since 1970), None where it does not tell.

    Quotation marks inside JSON strings are escaped, so these patterns match keys and never a job's arguments.
    """
    if message is None:
        return None
    start = max(0, len(message) - _TAIL)
    enqueued = _ENQUEUED.search(message, start)
    eta = _ETA.search(message, start)
    due = parse_time(eta[1].decode()) if eta else None
    if enqueued is None:
        return due
    return max(float(enqueued[1]), due or 0.0)
