"""Caching: cache-aside in Redis for what workers share, a small one in the process for what hardly changes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from pydantic import BaseModel
from redis.asyncio import Redis
from redis.exceptions import RedisError

from demo_app.faults import strikes
from demo_app.settings import shop_settings

Entry = TypeVar("Entry", bound=BaseModel)
Value = TypeVar("Value")

client = Redis.from_url(shop_settings().cache_url, socket_timeout=0.5, socket_connect_timeout=0.5)


class CacheAside:
    """Reads through Redis. Many requests for one missing key cause one load per worker (single flight).

    Entries live for ``ttl`` seconds, give or take a tenth, so that what was stored together does not expire
    together. Redis being down costs speed and nothing else.
    """

    def __init__(self, redis: Redis, ttl: float) -> None:
        self._redis, self._ttl = redis, ttl
        self._flights: dict[str, asyncio.Task[BaseModel | None]] = {}

    async def get(self, key: str, model: type[Entry], load: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        """Return the entry of a key, loaded and stored when Redis has none; None is not stored."""
        try:
            if strikes("cache_off"):
                await self._redis.delete(key)
            text = await self._redis.get(key)
        except RedisError:
            return await load()
        if text is not None:
            return model.model_validate_json(text)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.ensure_future(self._fill(key, load))
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        # Who gives up waiting does not stop the load for the others.
        return cast("Entry | None", await asyncio.shield(flight))

    async def drop(self, *keys: str) -> None:
        """Forget entries whose origin has changed. Call it after the commit."""
        try:
            await self._redis.delete(*keys)
        except RedisError:
            pass  # what is stale now goes with its time to live

    async def _fill(self, key: str, load: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        entry = await load()
        if entry is not None:
            milliseconds = int(self._ttl * random.uniform(0.9, 1.1) * 1000)
            try:
                await self._redis.set(key, entry.model_dump_json(), px=milliseconds)
            except RedisError:
                pass
        return entry


class LocalCache:
    """One value that every request needs and that may be some seconds old."""

    def __init__(self, ttl: float) -> None:
        self._ttl, self._expires = ttl, 0.0
        self._value: object = None

    async def get(self, load: Callable[[], Awaitable[Value]]) -> Value:
        """Return the value, loaded anew when it is older than the time to live."""
        if time.monotonic() >= self._expires:
            self._value = await load()
            self._expires = time.monotonic() + self._ttl
        return cast("Value", self._value)

    def drop(self) -> None:
        """Forget the value."""
        self._expires = 0.0


cache = CacheAside(client, shop_settings().cache_ttl)
