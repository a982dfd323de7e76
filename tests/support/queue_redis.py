"""What all kinds of queues on Redis share in the kit."""

from __future__ import annotations

from typing import Any, ClassVar

import redis

from demo_app.stack.servers import Redis
from tests.support.queue_kit import Subject


class OnRedis(Subject):
    """What all queues on Redis share."""

    system = "redis"
    broker = Redis
    kind: ClassVar[str]

    @property
    def url(self) -> str:
        """The sidecar's URL."""
        return f"{self.kind}+{self.server.url}?queues=mail"  # type: ignore[attr-defined]

    @property
    def client(self) -> Any:
        """A client of the broker."""
        return redis.Redis.from_url(self.server.url)  # type: ignore[attr-defined]

    def start(self) -> None:
        """Begin with an empty Redis."""
        self.client.flushall()

    def purge(self) -> None:
        """Delete the queue's key."""
        self.client.delete("mail")
