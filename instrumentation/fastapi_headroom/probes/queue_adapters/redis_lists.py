"""Plain Redis lists that an app uses as queues, by name.

LLEN is the depth. Where the items are JSON objects that tell when they were put there, ``timestamp=FIELD`` names
that field (seconds since 1970, or ISO 8601), and the older one of the two items at the ends gives the oldest age:
so it does not matter at which end the app pushes. Without the parameter there is no series of ages. What a consumer
has popped is gone from Redis: jobs in progress and consumers cannot be seen.
"""

from __future__ import annotations

import json
import time
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.redis_link import ALL, PORT, SYSTEM, RedisLink
from fastapi_headroom.probes.queue_adapters.times import parse_time
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse_named

EXAMPLE: Final = "list+redis://host:6379/0?queues=mail,reports&timestamp=enqueued_at"


class RedisListPoller:
    """Reads depth and oldest age of lists."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the lists that ``url`` names."""
        self.name = url.name
        self._lists = url.queues
        self._field = url.parameters.get("timestamp", "")
        self._link = RedisLink(url, EXAMPLE)

    @classmethod
    def from_url(cls, url: str) -> RedisListPoller:
        """Return the poller for ``list+redis://host:port/db?queues=a,b[&timestamp=FIELD]``."""
        return cls(parse_named(url, EXAMPLE, PORT, ("timestamp",)))

    def poll(self) -> list[Sample]:
        """Return depth, and the oldest age where items tell it. Raises redis.RedisError."""
        lengths = self._link.get([("LLEN", key) for key in self._lists])
        samples: list[Sample] = [
            (catalog.QUEUE_DEPTH, (SYSTEM, key, ALL), float(length))
            for key, length in zip(self._lists, lengths, strict=True)
        ]
        if self._field:
            samples += self._ages()
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def _ages(self) -> list[Sample]:
        ends = iter(self._link.get([("LINDEX", key, end) for key in self._lists for end in ("0", "-1")]))
        now = time.time()
        samples: list[Sample] = []
        for key, head, tail in zip(self._lists, ends, ends, strict=False):
            labels = (SYSTEM, key, ALL)
            if head is None or tail is None:
                samples.append((catalog.QUEUE_OLDEST_AGE, labels, 0.0))
            elif moments := [moment for item in (head, tail) if (moment := self._put_at(item)) is not None]:
                samples.append((catalog.QUEUE_OLDEST_AGE, labels, max(0.0, now - min(moments))))
        return samples

    def _put_at(self, item: bytes) -> float | None:
        """Return when an item was put into its list (seconds since 1970), None where it does not tell."""
        try:
            document = json.loads(item)
        except ValueError:
            return None
        value = document.get(self._field) if isinstance(document, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        return parse_time(value) if isinstance(value, str) else None
