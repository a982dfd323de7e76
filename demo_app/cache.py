"""Caching: cache-aside in Redis for what workers share, small ones in the process for what is asked for most."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from cachetools import TTLCache
from pydantic import BaseModel
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

import fastapi_headroom as headroom
from demo_app.changes import Changes
from demo_app.faults import strikes
from demo_app.settings import shop_settings

Entry = TypeVar("Entry", bound=BaseModel)
Value = TypeVar("Value")


def connect(url: str) -> Redis:
    """Return a client that gives up soon: a cache that is waited for costs more than it saves."""
    return Redis.from_url(url, socket_timeout=0.5, socket_connect_timeout=0.5, retry=Retry(NoBackoff(), 1))


class CacheAside:
    """Reads through Redis. Many requests for one missing key cause one load per worker (single flight).

    Entries live for ``ttl`` seconds, give or take a tenth, so that what was stored together does not expire
    together. Redis being down costs speed and nothing else. Each entry carries when its load began, so that one
    whose origin has changed since is known as such: it is loaded anew, or served and counted as stale where the cache
    ``lags``, as one does that no event reaches and that only its time to live keeps in step.
    """

    def __init__(self, redis: Redis, name: str, ttl: float, changes: Changes, *, lags: bool = False) -> None:
        self._redis, self._name, self._ttl, self._changes, self._lags = redis, name, ttl, changes, lags
        self._flights: dict[str, asyncio.Task[BaseModel | None]] = {}

    async def get(
        self,
        pattern: str,
        number: int,
        model: type[Entry],
        load: Callable[[], Awaitable[Entry | None]],
        *,
        naive: bool = False,
    ) -> Entry | None:
        """Return the entry of a key (``product:{}`` and a number), loaded and stored when Redis has none.

        None is not stored. ``naive`` forgets good habits: everybody who misses loads, and entries live for a second.
        """
        key = pattern.format(number)
        flight = self._flights.get(key)
        if flight is None or naive:
            try:
                if strikes("cache_off"):
                    await self._redis.delete(key)
                text = await self._redis.get(key)
            except RedisError:
                return await self._once(key, load)
            if text is not None:
                began, _, body = bytes(text).partition(b" ")
                is_stale = self._changes.after(key, float(began))
                if is_stale and (self._lags or strikes("stale_cache")):
                    headroom.cache_result(self._name, True, pattern, stale=True, age=time.time() - float(began))
                    is_stale = False
                if not is_stale:
                    return model.model_validate_json(body)
            if naive:
                return await self._fill(key, load, 1.0)
        return await self._once(key, lambda: self._fill(key, load, self._ttl * random.uniform(0.9, 1.1)))

    async def drop(self, pattern: str, number: int) -> None:
        """Forget an entry whose origin has changed, here and in every worker. Call it after the commit."""
        key = pattern.format(number)
        if not strikes("stale_cache"):
            try:
                headroom.cache_invalidated(self._name, pattern, await self._redis.delete(key))
            except RedisError:
                pass  # what is stale now is known as such, and goes with its time to live
        await self._changes.tell(key)

    async def _once(self, key: str, load: Callable[[], Awaitable[Entry | None]]) -> Entry | None:
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.ensure_future(load())
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        # Who gives up waiting does not stop the load for the others.
        return cast("Entry | None", await asyncio.shield(flight))

    async def _fill(self, key: str, load: Callable[[], Awaitable[Entry | None]], ttl: float) -> Entry | None:
        began = time.time()
        entry = await load()
        if entry is not None:
            try:
                await self._redis.set(key, f"{began:.6f} {entry.model_dump_json()}", px=int(ttl * 1000))
            except RedisError:
                pass
        return entry


class LocalCache:
    """One value that every request needs and that may be some seconds old."""

    def __init__(self, name: str, ttl: float) -> None:
        self._name, self._ttl, self._expires = name, ttl, 0.0
        self._value: object = None

    async def get(self, load: Callable[[], Awaitable[Value]]) -> Value:
        """Return the value, loaded anew when it is older than the time to live."""
        is_fresh = time.monotonic() < self._expires
        headroom.cache_result(self._name, is_fresh)
        if not is_fresh:
            self._value = await load()
            self._expires = time.monotonic() + self._ttl
        return cast("Value", self._value)

    def drop(self) -> None:
        """Forget the value."""
        self._expires = 0.0


client = connect(shop_settings().cache_url)
west_client = connect(shop_settings().cache_west_url)
changes = Changes(client)
cache = CacheAside(client, "redis", shop_settings().cache_ttl, changes)
west = CacheAside(west_client, "redis-west", shop_settings().cache_west_ttl, changes, lags=True)
"""The cache of a second region: nobody deletes there, entries end with their time to live."""
near: TTLCache[str, BaseModel] = TTLCache(maxsize=100, ttl=5.0)
"""In front of Redis, in each worker. An event ends an entry before its time."""


def _changed(key: str) -> None:
    if near.pop(key, None) is not None:
        headroom.cache_invalidated("near", "org:{}:plan")


changes.on_change(_changed)
