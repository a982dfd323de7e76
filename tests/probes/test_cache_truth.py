"""The cache probe's counts against an app's own book-keeping, over a random mixture of commands on a real Redis."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import redis.asyncio

from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE, Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import operations, results, value

ROUNDS = 400


class Shop:
    """An app that knows what is in its cache, and keeps books of what it was answered."""

    def __init__(self, client: Any, chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self._there: set[str] = set()
        self.looked_up: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[str] = Counter()

    def _key(self) -> str:
        return f"{self._chance.choice(('plan', 'user', 'cart'))}:{self._chance.randrange(12)}"

    def _saw(self, key: str) -> None:
        self.looked_up[key.split(":")[0] + ":{}", "hit" if key in self._there else "miss"] += 1

    def _queue(self, target: Any) -> str:
        """Issue one command on a client or a pipeline, and note what it will be answered."""
        kind, key = (
            self._chance.choice(("get", "mget", "exists", "set", "setex", "delete", "incr", "lpush")),
            self._key(),
        )
        if kind == "get":
            self._saw(key)
            self.sent = target.get(key)
        elif kind == "mget":
            keys = [self._key() for _ in range(self._chance.randrange(1, 6))]
            for each in keys:
                self._saw(each)
            self.sent = target.mget(keys)
        elif kind == "exists":
            self._saw(key)
            self.sent = target.exists(key)
        elif kind in ("set", "setex"):
            self._there.add(key)
            self.sent = target.set(key, "x", ex=60 if kind == "setex" else None)
            kind = "set"
        elif kind == "delete":
            self._there.discard(key)
            self.sent = target.delete(key)
            kind = "del"
        elif kind == "incr":
            self.sent = target.incr("counter")
            kind = "incrby"
        else:
            self.sent = target.lpush("jobs", "job")
            kind = ""
        return kind

    async def step(self) -> bool:
        """Do one thing; return whether it is a cache operation."""
        if self._chance.random() < 0.3:
            async with self._client.pipeline(transaction=self._chance.random() < 0.5) as pipe:
                kinds = [self._queue(pipe) for _ in range(self._chance.randrange(1, 6))]
                await pipe.execute()
            self.calls["pipeline"] += any(kinds)
            return any(kinds)
        kind = self._queue(self._client)
        await self.sent
        if kind:
            self.calls[kind] += 1
        return bool(kind)


async def test_counts_are_the_apps_own(redis_server: Redis) -> None:
    """After hundreds of commands every count, operation and call of a request equals what the app noted."""
    writer, probe = Writer.in_memory(), CacheProbe(load({}))
    client = redis.asyncio.Redis(port=redis_server.port, db=8)
    await client.flushdb()
    probe.name_clients({"main": client})
    probe.bind(writer)
    shop, calls = Shop(client, random.Random(11)), 0

    async def request() -> Ledger:
        nonlocal calls
        books = Ledger("GET")
        ledger.current.set(books)
        for _ in range(4):
            calls += await shop.step()
        books.finish(books.started + 5)
        return books

    served = [await asyncio.create_task(request()) for _ in range(ROUNDS // 4)]
    assert results(writer) == dict(shop.looked_up)
    assert operations(writer) == dict(shop.calls)
    assert sum(books.cache_calls for books in served) == calls == sum(shop.calls.values())
    for books in served:
        assert books.waits == []
        assert abs(sum(books.seconds) - 5) < 1e-6
    stage = sum(books.seconds[CACHE] for books in served)
    timed = sum(
        value(writer, "headroom_cache_operation_duration_seconds_sum", cache="main", operation=operation)
        for operation in shop.calls
    )
    assert 0.8 * timed < stage < 1.5 * timed + 0.1, "the stage is what the operations took"
    assert value(writer, "headroom_cache_duplicate_fills_total", cache="main", key_pattern="plan:{}") == 0
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()
    await client.aclose()
