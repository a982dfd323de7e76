"""Redis streams with consumer groups.

Each group of a stream is a queue of its own, named ``stream/group``: two groups read the same entries each at their
own pace. Its depth is the group's ``lag`` (XINFO GROUPS, Redis 7 or later), in progress are the entries delivered
and not acknowledged, and an entry's id holds the time at which it was added, so the first one that was not delivered
tells the oldest age.

Redis 7.0 goes on counting entries in the lag that were trimmed away (XTRIM, MAXLEN) before the group read them. So
where a group has yet to read the stream's first entry its depth is the stream's length, and it is 0 where nothing is
left to read.

Redis gives no lag where entries were deleted out of order behind the group (XDEL) or the group began in the middle.
Then up to ``COUNTED`` entries are counted; of more there is no depth (a gap and no guess), while the age stays.

Consumers have no series: a group keeps the names of those that were killed, and Redis before 7.2 does not notice one
that asks and gets nothing, so a count would call the dead alive or the idle dead.
"""

from __future__ import annotations

import time
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.redis_link import ALL, PORT, SYSTEM, Command, RedisLink
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse_named

EXAMPLE: Final = "stream+redis://host:6379/0?queues=orders"
COUNTED: Final = 100
"""Entries that are counted one by one where Redis does not know a group's lag."""


class RedisStreamPoller:
    """Reads lag, pending entries and oldest age of every group of some streams."""

    def __init__(self, url: QueueURL, link: RedisLink | None = None) -> None:
        """Prepare to poll the streams that ``url`` names, over ``link`` where there is one."""
        self.name = url.name
        self._streams = url.queues
        self._link = link or RedisLink(url, EXAMPLE)

    @classmethod
    def from_url(cls, url: str) -> RedisStreamPoller:
        """Return the poller for ``stream+redis://host:port/db?queues=a,b``."""
        return cls(parse_named(url, EXAMPLE, PORT))

    def poll(self) -> list[Sample]:
        """Return the state of every group; a stream that does not exist yet has none. Raises redis.RedisError."""
        return self.poll_streams(self._streams)

    def poll_streams(self, streams: tuple[str, ...]) -> list[Sample]:
        """Return the state of every group of these streams. Raises redis.RedisError."""
        groups = self._groups(streams)
        questions: list[Command] = []
        for stream, group in groups:
            after = b"(" + group[b"last-delivered-id"]
            wanted = COUNTED + 1 if group[b"lag"] is None else 1
            questions.append(("XLEN", stream))
            questions.append(("XRANGE", stream, "-", "+", "COUNT", "1"))
            questions.append(("XRANGE", stream, after, "+", "COUNT", str(wanted)))
        replies = iter(self._link.get(questions))
        now = time.time()
        samples: list[Sample] = []
        for (stream, group), length, first, unread in zip(groups, replies, replies, replies, strict=False):
            labels = (SYSTEM, f"{stream}/{group[b'name'].decode(errors='replace')}", ALL)
            samples.append((catalog.QUEUE_IN_PROGRESS, labels, float(group[b"pending"])))
            if (depth := _depth(group[b"lag"], length, first, unread)) is not None:
                samples.append((catalog.QUEUE_DEPTH, labels, float(depth)))
            added = int(unread[0][0].partition(b"-")[0]) / 1000 if unread else now
            samples.append((catalog.QUEUE_OLDEST_AGE, labels, max(0.0, now - added)))
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def _groups(self, streams: tuple[str, ...]) -> list[tuple[str, dict[bytes, Any]]]:
        from redis.exceptions import ResponseError

        found: list[tuple[str, dict[bytes, Any]]] = []
        replies = self._link.ask([("XINFO", "GROUPS", stream) for stream in streams])
        for stream, reply in zip(streams, replies, strict=True):
            if isinstance(reply, ResponseError):
                if "no such key" in str(reply):
                    continue
                raise reply
            found += [(stream, {b"lag": None} | _fields(group)) for group in reply]
        return found


def _depth(lag: int | None, length: int, first: list[Any], unread: list[Any]) -> int | None:
    """Return how many entries a group has yet to read, None where that is not known.

    ``length`` and ``first`` are of the stream, ``unread`` holds the first entries behind the group's last one.
    """
    if not unread:
        return 0
    if first and first[0][0] == unread[0][0]:
        return length
    if lag is None and len(unread) <= COUNTED:
        return len(unread)
    return lag


def _fields(row: Any) -> dict[bytes, Any]:
    """Return a reply of names and values in turn (RESP2) or as a map (RESP3) as a dictionary."""
    return row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True))
