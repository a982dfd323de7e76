"""arq: one sorted set per queue, whose scores say when each job is due (milliseconds since 1970).

A job stays in that set until it has ended; while it runs there is a key ``arq:in-progress:ID`` beside it. So what is
due is what is ready and what runs, and only asking for the keys tells one from the other. Workers look at the first
jobs that are due and start those of them (``queue_read_limit``: 100, or five times ``max_jobs``), so the running ones
are among the first: up to ``LOOKED_AT`` are asked for, and one that would run behind them counts as ready. Counts and
keys are read in one transaction, so that a job that just starts or ends is counted once.

The oldest age runs from when the first job that does not run was due: its enqueueing, or the time that it was deferred
to. A job that was given back (``Retry`` without ``defer``, or a worker that was shut down) keeps its time.

The key of a job whose worker was killed stays until it expires: ten seconds after the longest time-out of the worker's
functions (310 s by arq's defaults). Until then the job counts as in progress; no worker takes it either.

Failed jobs are known to their results alone, and all workers of a queue share one key of health: no series for these.
"""

from __future__ import annotations

import time
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.redis_link import ALL, PORT, SYSTEM, Command, RedisLink
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse

EXAMPLE: Final = "arq+redis://host:6379/0?queues=arq:queue"
DEFAULT_QUEUE: Final = "arq:queue"
LOOKED_AT: Final = 500
"""Jobs that are due of which each is asked whether it runs: as many as workers of 100 jobs at a time look at."""
_IN_PROGRESS = b"arq:in-progress:"


class ArqPoller:
    """Reads ready, running and deferred jobs and the oldest age of arq's queues."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url``, or arq's default one where it names none."""
        self.name = url.name
        self._queues = url.queues or (DEFAULT_QUEUE,)
        self._link = RedisLink(url, EXAMPLE)

    @classmethod
    def from_url(cls, url: str) -> ArqPoller:
        """Return the poller for ``arq+redis://host:port/db[?queues=a,b]``."""
        return cls(parse(url, EXAMPLE, PORT))

    def poll(self) -> list[Sample]:
        """Return the state of every queue. Raises redis.RedisError."""
        asked = str(round(time.time() * 1000))  # as arq writes it: rounded, not cut off
        firsts = self._link.get([("ZRANGE", queue, "0", str(LOOKED_AT - 1), "WITHSCORES") for queue in self._queues])
        heads = [[(job, score) for job, score in _pairs(first) if score <= float(asked)] for first in firsts]
        questions: list[Command] = []
        for queue, head in zip(self._queues, heads, strict=True):
            questions += [
                ("MULTI",),
                ("ZCOUNT", queue, "-inf", asked),
                ("ZCOUNT", queue, f"({asked}", "+inf"),
            ]
            if head:
                questions.append(("MGET", *(_IN_PROGRESS + job for job, _ in head)))
            questions.append(("EXEC",))
        answers = [reply for reply in self._link.get(questions) if isinstance(reply, list)]
        now = time.time()
        samples: list[Sample] = []
        for queue, head, (due, later, *keys) in zip(self._queues, heads, answers, strict=True):
            waiting = [score for (_, score), key in zip(head, keys[0] if keys else (), strict=True) if key is None]
            running = min(due, len(head) - len(waiting))
            labels = (SYSTEM, queue, ALL)
            samples.append((catalog.QUEUE_DEPTH, labels, float(due - running)))
            samples.append((catalog.QUEUE_IN_PROGRESS, labels, float(running)))
            samples.append((catalog.QUEUE_DELAYED, labels, float(later)))
            if waiting or due == running:
                samples.append(
                    (catalog.QUEUE_OLDEST_AGE, labels, max(0.0, now - waiting[0] / 1000) if waiting else 0.0)
                )
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


def _pairs(reply: list[Any]) -> list[tuple[bytes, float]]:
    """Return members and scores of a ZRANGE: flat in RESP2, a list of pairs in RESP3."""
    if reply and isinstance(reply[0], list):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]
