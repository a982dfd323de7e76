"""What single libraries do that others do not: broken connections, refusals, opening within a checkout."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import httpx
import psycopg_pool
import pytest
import redis
import redis.asyncio

from demo_app.stack.servers import Postgres, Redis
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pools.probe import OtherPoolsProbe
from fastapi_headroom.store.writer import Writer
from tests.probes.pools import libraries
from tests.support.drivers import kill

POOL = "db_client_connection_pool_name"


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def probe(writer: Writer) -> Iterator[OtherPoolsProbe]:
    probe = OtherPoolsProbe()
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.mark.parametrize("held", [True, False], ids=["held", "idle"])
async def test_asyncpg_connections_that_the_server_ends(
    probe: OtherPoolsProbe, writer: Writer, postgres: Postgres, held: bool
) -> None:
    """A connection that the server ended, held or idle, is one invalidation, and the next checkout opens one."""
    labels = {POOL: f"asyncpg:postgres@127.0.0.1:{postgres.port}"}
    async with asyncpg.create_pool(postgres.dsn, min_size=0, max_size=1) as pool:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
            if held:
                await kill(postgres, pid, connection._con)
        if not held:
            await kill(postgres, pid)
        async with asyncio.timeout(30):
            while pool.get_size():
                await asyncio.sleep(0.01)
        assert await pool.fetchval("select 1") == 1
        assert writer.value("headroom_pool_invalidations_total", **labels) == 1
        assert writer.value("db_client_connection_create_time_seconds_count", **labels) == 2
        created = writer.value("db_client_connection_create_time_seconds_sum", **labels)
        assert created > 0.002
        assert writer.value("db_client_connection_wait_time_seconds_sum", **labels) < created
        await pool.expire_connections()  # no fault: they are replaced in good order
        assert await pool.fetchval("select 1") == 1
        assert writer.value("headroom_pool_invalidations_total", **labels) == 1


async def test_asyncpg_errors_while_connecting(probe: OtherPoolsProbe, writer: Writer, postgres: Postgres) -> None:
    """A checkout that cannot connect is no hold and no time-out, and leaves nothing in use."""
    labels = {POOL: f"asyncpg:missing@127.0.0.1:{postgres.port}"}
    pool = await asyncpg.create_pool(postgres.dsn, min_size=0, max_size=1)
    pool.set_connect_args(postgres.dsn, user="headroom", database="missing")
    for _ in range(3):
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await pool.acquire()
    probe.sample()
    assert writer.value("db_client_connection_count", db_client_connection_state="used", **labels) == 0
    assert writer.value("db_client_connection_use_time_seconds_count", **labels) == 0
    assert writer.value("db_client_connection_timeouts_total", **labels) == 0
    await pool.close()


async def test_psycopg_connections_that_fail_their_check(
    probe: OtherPoolsProbe, writer: Writer, postgres: Postgres
) -> None:
    """A connection that fails the check before a checkout is one invalidation, and nobody has held it."""
    pool = psycopg_pool.AsyncConnectionPool(
        postgres.dsn,
        min_size=1,
        max_size=1,
        name="shop",
        open=False,
        check=psycopg_pool.AsyncConnectionPool.check_connection,
    )
    await pool.open(wait=True)
    async with pool.connection() as connection:
        pid = connection.info.backend_pid
    await kill(postgres, pid)
    async with pool.connection() as connection:
        assert connection.info.backend_pid != pid
        probe.sample()
        assert writer.value("headroom_pool_invalidations_total", **{POOL: "psycopg:shop"}) == 1
        used = writer.value("db_client_connection_count", db_client_connection_state="used", **{POOL: "psycopg:shop"})
        assert used == 1
    assert writer.value("db_client_connection_use_time_seconds_count", **{POOL: "psycopg:shop"}) == 2
    await pool.close()


async def test_a_null_pool_opens_in_the_checkout(probe: OtherPoolsProbe, writer: Writer, postgres: Postgres) -> None:
    """A pool that keeps nothing has create time instead of wait, sync and async, and no limit where it has none."""
    sync = psycopg_pool.NullConnectionPool(postgres.dsn, name="sync", open=True)
    with sync.connection() as connection:
        connection.execute("select 1")
    sync.close()
    unlimited = psycopg_pool.AsyncNullConnectionPool(postgres.dsn, name="async", open=False)
    await unlimited.open()
    async with unlimited.connection():
        probe.sample()
    await unlimited.close()
    for name in ("psycopg:sync", "psycopg:async"):
        assert writer.value("db_client_connection_create_time_seconds_count", **{POOL: name}) == 1
        created = writer.value("db_client_connection_create_time_seconds_sum", **{POOL: name})
        assert created > 0.001
        assert writer.value("db_client_connection_wait_time_seconds_sum", **{POOL: name}) < created
        with pytest.raises(KeyError):
            writer.value("db_client_connection_max", **{POOL: name})


async def test_a_pool_of_redis_that_refuses(probe: OtherPoolsProbe, writer: Writer, redis_server: Redis) -> None:
    """redis-py's ConnectionPool has no wait and nobody pending; what it refuses counts as a time-out."""
    labels = {POOL: f"redis:127.0.0.1:{redis_server.port}/0"}
    pool = redis.asyncio.ConnectionPool.from_url(redis_server.url, max_connections=1)
    connection = await pool.get_connection()
    with pytest.raises(redis.ConnectionError):
        await pool.get_connection()
    probe.sample()
    assert writer.value("db_client_connection_timeouts_total", **labels) == 1
    assert writer.value("db_client_connection_count", db_client_connection_state="used", **labels) == 1
    assert writer.value("db_client_connection_max", **labels) == 1
    await pool.release(connection)
    client = redis.asyncio.Redis(connection_pool=pool)
    assert await client.ping()
    await pool.disconnect()
    probe.sample()
    assert writer.value("db_client_connection_count", db_client_connection_state="idle", **labels) == 0
    assert not [name for name, _ in writer.samples() if "wait_time" in name or "pending" in name]
    limitless = redis.ConnectionPool.from_url(redis_server.url, max_connections=2**31)
    redis.Redis(connection_pool=limitless).ping()
    limitless.close()
    await pool.aclose()


async def test_redis_errors_while_connecting_are_no_time_outs(probe: OtherPoolsProbe, writer: Writer) -> None:
    """A server that is not there is no exhausted pool: nothing is counted as a time-out, nothing stays in use."""
    pool = redis.asyncio.BlockingConnectionPool.from_url("redis://127.0.0.1:1/0", max_connections=2, timeout=1)
    client = redis.asyncio.Redis(connection_pool=pool, retry=None)
    with pytest.raises(redis.ConnectionError):
        await client.ping()
    probe.sample()
    labels = {POOL: "redis:127.0.0.1:1/0"}
    assert writer.value("db_client_connection_timeouts_total", **labels) == 0
    assert writer.value("db_client_connection_count", db_client_connection_state="used", **labels) == 0
    assert writer.value("db_client_connection_use_time_seconds_count", **labels) == 0
    await pool.aclose()


async def test_one_wait_per_request_of_httpx(probe: OtherPoolsProbe, writer: Writer) -> None:
    """Requests that httpcore wakes and sends back into the line have waited once, and their whole time."""
    with libraries.serving() as address:
        async with httpx.AsyncClient(base_url=address, limits=httpx.Limits(max_connections=1)) as client:
            await client.get("/")
            started = time.perf_counter()
            answers = await asyncio.gather(*(client.get("/") for _ in range(20)))
            elapsed = time.perf_counter() - started
        assert {answer.status_code for answer in answers} == {200}
        assert writer.value("db_client_connection_wait_time_seconds_count", **{POOL: "httpx"}) == 21
        assert writer.value("db_client_connection_wait_time_seconds_sum", **{POOL: "httpx"}) < 20 * elapsed
        assert writer.value("db_client_connection_use_time_seconds_count", **{POOL: "httpx"}) == 21
        assert writer.value("db_client_connection_create_time_seconds_count", **{POOL: "httpx"}) == 1


async def test_a_pool_that_is_gone_is_forgotten(probe: OtherPoolsProbe, postgres: Postgres) -> None:
    """Measuring keeps no pool alive."""
    pool = await asyncpg.create_pool(postgres.dsn, min_size=0, max_size=1)
    assert await pool.fetchval("select 1") == 1
    assert sum(len(library.meters._by_id) for library in probe._libraries) == 1
    await pool.close()
    del pool
    gc.collect()
    assert sum(len(library.meters._by_id) for library in probe._libraries) == 0


@pytest.mark.parametrize("library", ["asyncpg", "psycopg"])
async def test_a_connection_that_a_request_never_gives_back_is_counted_and_told(
    writer: Writer, postgres: Postgres, library: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found by route within a look of the threshold, once, while it is still out; a short hold is not."""
    caplog.set_level(logging.WARNING, "fastapi_headroom")
    probe = OtherPoolsProbe(hold_threshold=0.6)
    probe.bind(writer)
    pool: Any
    if library == "asyncpg":
        pool = await asyncpg.create_pool(postgres.dsn, min_size=0, max_size=2)
        take, give, name = pool.acquire, pool.release, f"asyncpg:postgres@127.0.0.1:{postgres.port}"
    else:
        pool = psycopg_pool.AsyncConnectionPool(postgres.dsn, min_size=1, max_size=2, name="shop", open=False)
        await pool.open(wait=True)
        take, give, name = pool.getconn, pool.putconn, "psycopg:shop"
    request = Ledger("GET")
    request.route = "/orders/{id}"
    ledger.current.set(request)
    await give(await take())
    kept = await take()
    request.finish(time.perf_counter())
    probe.sample()
    assert not caplog.records
    await asyncio.sleep(0.65)
    for _ in range(2):
        await asyncio.to_thread(probe.sample)
    (record,) = [record.getMessage() for record in caplog.records]
    assert f"pool {name} has been held for" in record
    assert "route /orders/{id}, which was answered: release it" in record
    labels = {POOL: name, "http_route": "/orders/{id}"}
    assert writer.value("headroom_pool_long_holds_total", **labels) == 1
    await give(kept)
    await pool.close()
    probe.close()
