"""PostgreSQL is killed and started again under load: nothing drifts, nothing is lost, the app goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from demo_app.stack.process import ProcessError
from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.drivers import KILLED

POOL = "db_client_connection_pool_name"
CLIENTS = 12
SIZE, OVERFLOW = 3, 2


class Load:
    """Clients that use the pool without end and count what they did."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.statements = self.served = self.failed = 0
        self.rounds = [0] * CLIENTS
        """Answers that each client got."""
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]

    async def _client(self, number: int) -> None:
        while True:
            try:
                async with self.engine.connect() as connection:
                    self.statements += 1
                    await connection.execute(text("select pg_sleep(0.005)"))
            except KILLED:
                self.failed += 1
                await asyncio.sleep(0.01)
            else:
                self.served += 1
                self.rounds[number] += 1

    async def all_served_again(self) -> None:
        """Wait until each client got two more answers."""
        before = list(self.rounds)
        while any(now < then + 2 for now, then in zip(self.rounds, before, strict=True)):
            assert not any(task.done() for task in self._tasks)
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """End all clients, in the middle of what they do."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Postgres]:
    """A PostgreSQL of its own, to be killed."""
    server = Postgres(tmp_path / "postgres")
    server.start()
    yield server
    server.stop()


async def start_again(database: Postgres) -> None:
    """Start the server on the data of the one that was killed, whose children may take a moment to go."""
    for _ in range(50):
        try:
            return database.start()
        except ProcessError:
            database.halt()
            await asyncio.sleep(0.2)
    raise AssertionError("PostgreSQL did not start again")


@pytest.mark.parametrize("pre_ping", [False, True])
async def test_a_killed_database_leaves_no_drift(database: Postgres, pre_ping: bool) -> None:
    """After kill -9 and a restart, twice, all clients are served; used, idle and statements equal the truth."""
    writer = Writer.in_memory()
    probe = PoolProbe(load({}))
    probe.bind(writer)
    engine = create_async_engine(
        database.url("asyncpg"),
        pool_size=SIZE,
        max_overflow=OVERFLOW,
        pool_pre_ping=pre_ping,
        pool_logging_name="shop",
        connect_args={"server_settings": {"application_name": "load"}},
    )
    try:
        async with asyncio.timeout(100):
            clients = Load(engine)
            for _ in range(2):
                await clients.all_served_again()
                failed = clients.failed
                os.kill(database.pid, signal.SIGKILL)
                while clients.failed < failed + CLIENTS:
                    await asyncio.sleep(0.01)
                probe.sample()
                assert count(writer, "used") + count(writer, "idle") <= SIZE + OVERFLOW
                database.halt()
                await start_again(database)
                await clients.all_served_again()
            await clients.stop()
        probe.sample()
        assert count(writer, "used") == engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        async with asyncio.timeout(30):  # the server's side of a connection ends a moment later
            while count(writer, "idle") != await open_connections(database):
                await asyncio.sleep(0.05)
        assert writer.value("db_client_connection_pending_requests", **{POOL: "shop"}) == 0
        assert selects(writer) == clients.statements
        assert writer.value("headroom_pool_invalidations_total", **{POOL: "shop"}) > 0
        checkouts = writer.value("db_client_connection_use_time_seconds_count", **{POOL: "shop"})
        assert checkouts >= clients.statements
        assert writer.value("headroom_probe_up", probe="pool") == 1.0
    finally:
        probe.close()
        await engine.dispose()


def count(writer: Writer, state: str) -> float:
    return writer.value("db_client_connection_count", **{POOL: "shop"}, db_client_connection_state=state)


def selects(writer: Writer) -> float:
    return sum(
        number
        for (name, labels), number in writer.samples().items()
        if name == "db_client_operation_duration_seconds_count" and dict(labels)["db_operation_name"] == "SELECT"
    )


async def open_connections(database: Postgres) -> int:
    """Return how many connections of the load the server has."""
    connection = await asyncpg.connect(database.dsn)
    try:
        return int(await connection.fetchval("select count(*) from pg_stat_activity where application_name = 'load'"))
    finally:
        await connection.close()
