"""The limit moves while SQLAlchemy replaces connections under it: for their age, and after a failed pre-ping."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.probes.test_pool_resize import APPLICATION, close, open_on_server, resizer_of
from tests.support.drivers import KILLED

NAME = {"db_client_connection_pool_name": "replaced"}
KILL = text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = :name AND state = 'idle'"
)


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def probe(writer: Writer) -> Iterator[PoolProbe]:
    probe = PoolProbe(load({}))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.mark.parametrize("kind", ["recycle", "pre_ping"])
async def test_connections_that_are_replaced_while_the_limit_moves_lose_no_place(
    kind: str, probe: PoolProbe, writer: Writer, postgres: Postgres
) -> None:
    """300 checkouts of connections too old, or killed by the server as they lie ready: used and idle are the truth."""
    replacing = {"pool_recycle": 0} if kind == "recycle" else {"pool_pre_ping": True}
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_size=2, max_overflow=1, pool_timeout=30, pool_logging_name="replaced",
        connect_args={"server_settings": {"application_name": APPLICATION}}, **replacing,
    )  # fmt: skip
    resizer = resizer_of(engine, probe)
    admin = create_engine(postgres.url(driver="psycopg"), isolation_level="AUTOCOMMIT")
    rng = random.Random(11)
    served = broken = 0
    served_all = asyncio.Event()

    async def user(number: int) -> None:
        nonlocal served, broken
        rng = random.Random(number)
        for _ in range(50):
            try:
                async with engine.connect() as connection:
                    await connection.execute(text("SELECT 1"))
                    await asyncio.sleep(rng.random() * 0.002)
                served += 1
            except KILLED:  # killed between the ping and its first statement: the app's own to bear
                broken += 1
            await asyncio.sleep(rng.random() * 0.004)

    def kill() -> None:
        with contextlib.closing(admin.connect()) as connection:
            connection.execute(KILL, {"name": APPLICATION})

    async def move() -> None:
        while not served_all.is_set():
            await close(resizer, resizer.resize(rng.randint(1, 8)))
            if kind == "pre_ping" and rng.random() < 0.2:
                await asyncio.to_thread(kill)
            await asyncio.sleep(0.003)

    mover = asyncio.create_task(move())
    await asyncio.wait_for(asyncio.gather(*(user(number) for number in range(6))), 60)
    served_all.set()
    await mover  # to its end: a kill that still runs in its thread would meet what comes next
    if kind == "pre_ping":  # for certain: what lies ready now is dead when it is asked for
        await close(resizer, resizer.resize(3))
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        await asyncio.to_thread(kill)
    assert served + broken == 300 and served > 100
    await close(resizer, resizer.resize(3))
    assert resizer.used == 0
    assert resizer.places <= 3
    for connection in [await engine.connect() for _ in range(3)]:
        await connection.execute(text("SELECT 1"))
        await connection.close()
    assert (resizer.places, resizer.used, resizer.closing) == (3, 0, 0)
    assert await asyncio.to_thread(open_on_server, postgres, 3) == 3
    probe.sample()
    assert writer.value("db_client_connection_count", **NAME, db_client_connection_state="used") == 0
    assert writer.value("db_client_connection_count", **NAME, db_client_connection_state="idle") == 3
    if kind == "recycle":
        assert writer.value("headroom_pool_recycles_total", **NAME, reason="age") > 100
    else:
        assert writer.value("headroom_pool_ping_failures_total", **NAME) > 0
    await engine.dispose()
    admin.dispose()
