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

import re
import time
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from fastapi_headroom import catalog
from fastapi_headroom.errors import MissingExtraError, SettingsError
from fastapi_headroom.probes.queue_adapters.base import Sample

ENQUEUED_AT: Final = "headroom_enqueued_at"
"""Message header with the time of publishing, in seconds since 1970."""
ALL: Final = "_all"
SYSTEM: Final = "redis"
PRIORITY_STEPS: Final[tuple[int, ...]] = (0, 3, 6, 9)
"""kombu's default ``priority_steps``."""
SEPARATOR: Final = "\x06\x16"
TIMEOUT: Final = 1.0
"""Seconds to wait for a connection or a reply."""
_EXAMPLE = "celery+redis://host:6379/0?queues=mail,reports&priorities=0,3,6,9"
_PARAMETERS = ("queues", "priorities", "namespace")
_TAIL = 65_536
"""Bytes at a message's end that are searched: kombu writes the body first, then the headers."""
_ENQUEUED = re.compile(rb'"%s": ?([0-9]+(?:\.[0-9]+)?)' % ENQUEUED_AT.encode())
_ETA = re.compile(rb'"eta": ?"([0-9T:.+Z -]+)"')


class CeleryRedisPoller:
    """Reads depth and oldest age of Celery queues on Redis over one connection of its own.

    It talks through a bare ``redis`` connection and not through a client object, so that the cache probe does
    not count the poll as the app's cache traffic.
    """

    def __init__(self, url: str, queues: tuple[str, ...], steps: tuple[int, ...], namespace: str) -> None:
        """Prepare to poll ``queues`` of the Redis at ``url`` (no connection is made yet)."""
        try:
            from redis.backoff import NoBackoff
            from redis.connection import ConnectionPool
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("redis", "redis", "Polling Celery queues on Redis") from error
        try:
            self._pool = ConnectionPool.from_url(
                url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)
            )
        except ValueError:  # its text may hold a part of the password
            raise SettingsError(f"queue URL has no usable host and port; it looks like {_EXAMPLE}") from None
        parts = urlsplit(url)
        self.name = f"celery+{parts.scheme}://{parts.hostname or 'localhost'}:{parts.port or 6379}{parts.path}"
        self._lists = [
            (queue, str(step), f"{namespace}{queue}{SEPARATOR}{step}" if step else f"{namespace}{queue}")
            for queue in queues
            for step in steps
        ]
        self._unacked = f"{namespace}unacked"
        self._connection: Any = None  # redis-py's connections are untyped
        self._first_seen: dict[str, tuple[int, float]] = {}

    @classmethod
    def from_url(cls, url: str) -> CeleryRedisPoller:
        """Return the poller for ``celery+redis://[user:password@]host:port/db?queues=a,b[&priorities=..][&namespace=..]``.

        ``priorities`` are kombu's ``priority_steps``, ``namespace`` its ``global_keyprefix``.
        """
        parts = urlsplit(url)
        ours = dict(parse_qsl(parts.query, keep_blank_values=True))
        for name in ours:
            if name not in _PARAMETERS:
                raise SettingsError(f"queue URL has unknown parameter {name!r}; known are {', '.join(_PARAMETERS)}")
        queues = tuple(dict.fromkeys(name for name in ours.get("queues", "").split(",") if name))
        if not queues:
            raise SettingsError(f"queue URL names no queue; it looks like {_EXAMPLE}")
        steps = PRIORITY_STEPS
        if text := ours.get("priorities"):
            if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
                raise SettingsError(f"queue URL has priorities={text!r}; priorities are numbers, such as 0,3,6,9")
            steps = tuple(sorted({int(step) for step in text.split(",")}))
        plain = urlunsplit((parts.scheme.removeprefix("celery+"), parts.netloc, parts.path, "", ""))
        return cls(plain, queues, steps, ours.get("namespace", ""))

    def poll(self) -> list[Sample]:
        """Return depth and oldest age per queue and priority, and the jobs in progress. Raises redis.RedisError."""
        *lengths, unacked = self._ask([*(("LLEN", key) for *_, key in self._lists), ("HLEN", self._unacked)])
        waiting = [key for (*_, key), length in zip(self._lists, lengths, strict=True) if length]
        oldest = dict(zip(waiting, self._ask([("LINDEX", key, "-1") for key in waiting]), strict=True))
        now = time.time()
        samples: list[Sample] = [(catalog.QUEUE_IN_PROGRESS, (SYSTEM, ALL, ALL), float(unacked))]
        for (queue, priority, key), length in zip(self._lists, lengths, strict=True):
            labels = (SYSTEM, queue, priority)
            samples.append((catalog.QUEUE_DEPTH, labels, float(length)))
            samples.append((catalog.QUEUE_OLDEST_AGE, labels, self._age(key, oldest.get(key), now)))
        return samples

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def _ask(self, commands: list[tuple[str, ...]]) -> list[Any]:
        """Send all commands at once and return the replies in their order."""
        if not commands:
            return []
        connection = self._connection or self._pool.make_connection()
        self._connection = connection
        try:
            connection.connect()  # does nothing when it is connected
            connection.send_packed_command(connection.pack_commands(commands))
            replies = [connection.read_response(disable_decoding=True) for _ in commands]
        except BaseException:
            self.close()  # replies that were not read would answer the next poll
            raise
        return replies

    def _age(self, key: str, message: bytes | None, now: float) -> float:
        """Return how long the oldest job of a list has been ready, in seconds."""
        if message is None:
            self._first_seen.pop(key, None)
            return 0.0
        ready = ready_since(message)
        if ready is None:
            identity = hash(message)
            seen, ready = self._first_seen.get(key, (None, now))
            if seen != identity:
                ready = now
                self._first_seen[key] = (identity, now)
        return max(0.0, now - ready)


def ready_since(message: bytes) -> float | None:
    """Return since when a message could have been run (seconds since 1970), None where it does not tell.

    Quotation marks inside JSON strings are escaped, so these patterns match keys and never a job's arguments.
    """
    start = max(0, len(message) - _TAIL)
    enqueued = _ENQUEUED.search(message, start)
    eta = _ETA.search(message, start)
    due = parse_eta(eta[1].decode()) if eta else None
    if enqueued is None:
        return due
    return max(float(enqueued[1]), due or 0.0)


def parse_eta(text: str) -> float | None:
    """Return an ISO 8601 time as seconds since 1970 (UTC where it names no zone), None when it is no time."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
