"""What has changed, told to all workers by events, so that nobody serves what is out of date without knowing it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

CHANNEL: Final = "shop-changes"
REMEMBERED: Final = 5_000
"""Keys whose latest change a worker remembers."""


class Changes:
    """When keys of the cache changed at their origin, as far as this worker has heard. Times are seconds since 1970."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._times: OrderedDict[str, float] = OrderedDict()
        self._listeners: list[Callable[[str], None]] = []

    def after(self, key: str, moment: float) -> bool:
        """Return whether a key's origin changed after a moment."""
        return self._times.get(key, 0.0) > moment

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call a function with each key that changes, in every worker."""
        self._listeners.append(listener)

    async def tell(self, key: str) -> None:
        """Tell all workers that a key's origin has changed. Call it after the commit."""
        now = time.time()
        self._note(key, now)
        try:
            await self._redis.publish(CHANNEL, json.dumps([key, now]))
        except RedisError:
            pass  # the others learn it when their entry's time to live is over

    async def listen(self) -> None:
        """Take note of what other workers tell, until cancelled; a connection that is lost is made anew."""
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=10.0)
                        if message is not None:
                            self._note(*json.loads(message["data"]))
            except (RedisError, OSError):
                await asyncio.sleep(1.0)

    def _note(self, key: str, moment: float) -> None:
        if self.after(key, moment - 1e-9):
            return  # our own word, come back
        self._times[key] = moment
        self._times.move_to_end(key)
        if len(self._times) > REMEMBERED:
            self._times.popitem(last=False)
        for listener in self._listeners:
            listener(key)
