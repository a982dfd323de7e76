"""Stampedes against a real Redis: misses of a key that somebody fills already are counted, and no others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
import redis.asyncio

from demo_app.stack.servers import Redis
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.cache_fills import FILL_SECONDS, MAX_CALLERS, MAX_FILLS, Fills
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import results, value

DUPLICATES = "headroom_cache_duplicate_fills_total"
NOW = "headroom_cache_concurrent_fills"


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
async def client(redis_server: Redis) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis(port=redis_server.port, db=6) as client:
        await client.flushdb()
        yield client


@pytest.fixture
def probe(writer: Writer, client: Any) -> Iterator[CacheProbe]:
    probe = CacheProbe(load({}), names={"main": client})
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()


def duplicates(writer: Writer, pattern: str = "plan:{}") -> float:
    return value(writer, DUPLICATES, cache="main", key_pattern=pattern)


def filling(writer: Writer) -> float:
    return value(writer, NOW, cache="main")


class Request:
    """One request of an app that keeps values in a cache, step by step."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._books = Ledger("GET")

    async def run(self, *command: Any) -> Any:
        """Send one command on behalf of this request."""

        async def send() -> Any:
            ledger.current.set(self._books)
            return await self._client.execute_command(*command)

        return await asyncio.create_task(send())

    def end(self) -> None:
        """End the request."""
        self._books.finish(self._books.started + 1)


async def test_a_stampede(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """Ten requests miss one key before the first has filled it: nine duplicates, which end one by one."""
    requests = [Request(client) for _ in range(10)]
    for request in requests:
        assert await request.run("GET", "plan:1") is None
    assert duplicates(writer) == 9
    assert filling(writer) == 9
    for left, request in zip((8, 7, 6, 5, 4, 3, 2, 1, 0, 0), requests, strict=True):
        await request.run("SET", "plan:1", "x", "EX", 60)
        assert filling(writer) == left
    assert duplicates(writer) == 9
    assert await Request(client).run("GET", "plan:1") == b"x"
    assert results(writer) == {("plan:{}", "miss"): 10, ("plan:{}", "hit"): 1}


async def test_no_stampede(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """Misses of different keys, of one request alone, one after the other, or of a key that is not there are none."""
    one, other = Request(client), Request(client)
    await one.run("GET", "plan:1"), await other.run("GET", "plan:2")
    await one.run("GET", "plan:1")  # looks again once it has a lock
    await one.run("SET", "plan:1", "x")
    await client.delete("plan:1")
    await other.run("GET", "plan:1")
    await other.run("SET", "plan:1", "x")
    first, second = Request(client), Request(client)
    await first.run("GET", "plan:3")  # there is no such plan: nobody writes it
    first.end()
    await second.run("GET", "plan:3")
    assert duplicates(writer) == 0
    assert filling(writer) == 0


async def test_who_waits_for_a_lock_is_done_when_it_hits(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """With single flight the others find the key written: they count while they wait, and are done with their hit."""
    one, two, three = (Request(client) for _ in range(3))
    for request in (one, two, three):
        await request.run("GET", "plan:1")
    assert filling(writer) == 2
    await one.run("SET", "plan:1", "x")
    assert filling(writer) == 1
    await two.run("GET", "plan:1")
    await three.run("MGET", "plan:1", "plan:2")
    assert filling(writer) == 0
    assert duplicates(writer) == 2


async def test_every_write_ends_a_fill(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """Hashes, sets, pipelines and a writer that asked for nothing end a fill as SET does."""
    for miss, write in (
        (("HGETALL", "plan:1"), ("HSET", "plan:1", "a", "1")),
        (("SMEMBERS", "plan:2"), ("SADD", "plan:2", "a")),
        (("MGET", "plan:3", "plan:4"), ("MSET", "plan:3", "x", "plan:4", "x")),
        (("GET", "plan:5"), ("SETEX", "plan:5", 60, "x")),
    ):
        one, two = Request(client), Request(client)
        before = duplicates(writer)
        await one.run(*miss), await two.run(*miss)
        assert duplicates(writer) - before == len(miss) - 1
        await one.run(*write), await two.run(*write)
        assert filling(writer) == 0, write
    one, two = Request(client), Request(client)
    await one.run("GET", "plan:6"), await two.run("GET", "plan:6")
    assert filling(writer) == 1
    await client.pipeline().set("plan:6", "x").execute()  # a job that nobody waits for
    assert filling(writer) == 0


async def test_requests_that_end_without_a_word(probe: CacheProbe, writer: Writer, client: Any) -> None:
    """A request that missed and ended fills no more: the next sample sees it."""
    requests = [Request(client) for _ in range(4)]
    for request in requests:
        await request.run("GET", "plan:1")
    assert filling(writer) == 3
    for request in requests[1:]:
        request.end()
    probe.sample()
    assert filling(writer) == 0
    await Request(client).run("GET", "plan:1")
    assert duplicates(writer) == 4, "the first one still fills"


async def test_outside_requests(probe: CacheProbe, writer: Writer, client: Any, redis_server: Redis) -> None:
    """Tasks and threads that miss the same key at the same time count too."""

    missed = asyncio.Event()

    async def job() -> None:
        await client.get("plan:1")
        await missed.wait()

    jobs = [asyncio.create_task(job()) for _ in range(3)]
    while results(writer).get(("plan:{}", "miss")) != 3:
        await asyncio.sleep(0.001)
    assert duplicates(writer) == 2
    missed.set()
    await asyncio.gather(*jobs)
    probe.sample()
    assert filling(writer) == 0

    with redis.Redis(port=redis_server.port, db=6) as sync_client:
        probe.name_clients({"main": sync_client})
        together = threading.Barrier(3)

        def work() -> None:
            sync_client.get("plan:2")
            together.wait(10)

        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(work) for _ in range(3)]:
                done.result()
    assert duplicates(writer) == 4


def test_bounds(writer: Writer) -> None:
    """However many keys and callers there are, a bounded number is followed, and what is over is dropped."""
    from fastapi_headroom import catalog

    fills = Fills(writer.gauge(catalog.CACHE_CONCURRENT_FILLS, "main"))
    busy = [Ledger("GET") for _ in range(MAX_CALLERS + 5)]
    for number in range(MAX_FILLS + 50):
        assert not fills.missed(f"plan:{number}", busy[0], 0.0)
    assert len(fills.open) == MAX_FILLS
    assert sum(fills.missed("plan:1", caller, 1.0) for caller in busy) == MAX_CALLERS - 1
    assert filling(writer) == MAX_CALLERS - 1
    assert fills.sweep(FILL_SECONDS + 1)
    assert (len(fills.open), filling(writer)) == (0, 0)
    assert not any(isinstance(key, str | bytes) for key in fills.open)


def test_the_gauge_is_there_from_the_start(writer: Writer, redis_server: Redis) -> None:
    """A cache that never had a stampede shows 0, and its counter is there from the first miss on."""
    with redis.Redis(port=redis_server.port, db=6) as client:
        probe = CacheProbe(load({}), names={"main": client})
        probe.bind(writer)
        client.set("seen:1", "x")
        assert writer.value(NOW, cache="main") == 0
        client.get("nothing:1")
        assert writer.value(DUPLICATES, cache="main", key_pattern="nothing:{}") == 0
        probe.close()
