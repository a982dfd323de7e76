"""RQ: its queues are found in the set ``rq:queues``, or named.

A queue is a Redis list of job ids, pushed at the right and popped at the left; the job's hash holds when it was
enqueued. Scheduled jobs are a sorted set by the time at which they are due. Those that are due lie there until a
scheduler moves them, so they count as ready and age from then: a scheduler that died shows as a growing queue.
Jobs that are not due yet, and jobs that wait for another one to end (deferred), are ``headroom_queue_delayed``.

In progress are the started jobs whose worker still sends heartbeats: an entry of a worker that was killed
counts until its heartbeat expires (90 s by RQ's defaults). Consumers are the registered workers whose key has not
expired: one that was killed counts until then (up to eight minutes by RQ's defaults).

A job that was enqueued ``at_front`` is the one that is asked for its age, though older ones lie behind it.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.redis_link import ALL, PORT, SYSTEM, Command, RedisLink
from fastapi_headroom.probes.queue_adapters.times import parse_time
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse

log = logging.getLogger("fastapi_headroom")

EXAMPLE: Final = "rq+redis://host:6379/0?queues=default,high"
QUEUES: Final = 100
"""Queues that are polled at most when they are found and not named."""
WORKERS: Final = 1_000
"""Workers of a queue up to which they are asked for one by one."""
_PREFIX = "rq:queue:"


class RQPoller:
    """Reads depth, oldest age, delayed, started and failed jobs, and workers of RQ's queues."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url``, or all that are found where it names none."""
        self.name = url.name
        self._named = url.queues
        self._link = RedisLink(url, EXAMPLE)
        self._warned = False

    @classmethod
    def from_url(cls, url: str) -> RQPoller:
        """Return the poller for ``rq+redis://host:port/db[?queues=a,b]``."""
        return cls(parse(url, EXAMPLE, PORT))

    def poll(self) -> list[Sample]:
        """Return the state of every queue. Raises redis.RedisError."""
        queues = self._named or self._found()
        asked = time.time()
        replies = self._link.get([command for queue in queues for command in _state(queue, asked)])
        width = len(replies) // max(1, len(queues))
        states = [replies[start : start + width] for start in range(0, len(replies), width or 1)]
        enqueued = self._enqueued_at([state[1] for state in states])
        alive = self._alive([(queue, state[8]) for queue, state in zip(queues, states, strict=True)])
        now = time.time()
        samples: list[Sample] = []
        for queue, state, since in zip(queues, states, enqueued, strict=True):
            ready, _, started, deferred, due, later, first, failed, _ = state
            moments = [] if since is None else [since]
            if due and first:
                moments.append(_score(first))
            rows: list[tuple[Metric, float]] = [
                (catalog.QUEUE_DEPTH, ready + due),
                (catalog.QUEUE_DELAYED, deferred + later),
                (catalog.QUEUE_IN_PROGRESS, started),
                (catalog.QUEUE_FAILED, failed),
            ]
            if moments or not ready + due:
                rows.append((catalog.QUEUE_OLDEST_AGE, max(0.0, now - min(moments)) if moments else 0.0))
            if queue in alive:
                rows.append((catalog.QUEUE_CONSUMERS, alive[queue]))
            samples += [(metric, (SYSTEM, queue, ALL), float(value)) for metric, value in rows]
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def _found(self) -> tuple[str, ...]:
        (keys,) = self._link.get([("SMEMBERS", "rq:queues")])
        names = sorted(key.decode(errors="replace").removeprefix(_PREFIX) for key in keys)
        if len(names) > QUEUES and not self._warned:
            self._warned = True
            log.warning(
                "fastapi-headroom: %s has %d queues, the first %d are polled; name those that matter: %s",
                self.name, len(names), QUEUES, EXAMPLE,
            )  # fmt: skip
        return tuple(names[:QUEUES])

    def _enqueued_at(self, jobs: list[bytes | None]) -> list[float | None]:
        """Return when each job was enqueued (seconds since 1970), None without a job or where it does not tell."""
        times = iter(self._link.get([("HGET", b"rq:job:" + job, "enqueued_at") for job in jobs if job is not None]))
        told = [None if job is None else next(times) for job in jobs]
        return [None if text is None else parse_time(text.decode(errors="replace")) for text in told]

    def _alive(self, registered: list[tuple[str, int]]) -> dict[str, int]:
        """Return how many workers of each queue have not expired; a queue with very many is left out."""
        asked = [queue for queue, count in registered if 0 < count <= WORKERS]
        members = self._link.get([("SMEMBERS", f"rq:workers:{queue}") for queue in asked])
        known = [(queue, tuple(keys)) for queue, keys in zip(asked, members, strict=True) if keys]
        counts: list[Any] = self._link.get([("EXISTS", *keys) for _, keys in known])
        alive = {queue: 0 for queue, count in registered if count <= WORKERS}
        return alive | {queue: count for (queue, _), count in zip(known, counts, strict=True)}


def _score(first: list[Any]) -> float:
    """Return the score in the reply to a ZRANGE of one: flat in RESP2, a list of pairs in RESP3."""
    return float(first[0][1] if isinstance(first[0], list) else first[1])


def _state(queue: str, now: float) -> tuple[Command, ...]:
    """Return the commands that ask for one queue's state, each O(1) or O(log n)."""
    return (
        ("LLEN", _PREFIX + queue),
        ("LINDEX", _PREFIX + queue, "0"),
        ("ZCOUNT", f"rq:wip:{queue}", f"{now:.3f}", "+inf"),
        ("ZCARD", f"rq:deferred:{queue}"),
        ("ZCOUNT", f"rq:scheduled:{queue}", "-inf", f"{now:.3f}"),
        ("ZCOUNT", f"rq:scheduled:{queue}", f"({now:.3f}", "+inf"),
        ("ZRANGE", f"rq:scheduled:{queue}", "0", "0", "WITHSCORES"),
        ("ZCARD", f"rq:failed:{queue}"),
        ("SCARD", f"rq:workers:{queue}"),
    )
