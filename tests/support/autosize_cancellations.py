"""Checkouts of an autosized pool that are cancelled at random, and what is left of the pool after that."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

import fastapi_headroom as headroom
from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.autosize_proofs import COUNT

APPLICATION = "headroom-cancelled"
CALLERS = 40
NAME = {"db_client_connection_pool_name": "cancelled"}


class Cancelled(NamedTuple):
    """How many were cancelled in which state, and the connections when all was at rest."""

    held: int
    waiting: int
    changes: float
    used: float
    idle: float
    places: int
    open_on_server: int


async def cancel_at_random(directory: Path, postgres: Postgres, *, cancellations: int, seed: int) -> Cancelled:
    """Cancel so many checkouts, while crowds come and go so that the limit moves between 1 and 12."""
    engine = create_async_engine(
        postgres.url(driver="asyncpg"), pool_timeout=30, pool_logging_name="cancelled",
        connect_args={"server_settings": {"application_name": APPLICATION}},
    )  # fmt: skip
    writer, probe = Writer.open(directory), PoolProbe(load({}, directory=directory))
    probe.bind(writer)
    sizing = headroom.autosize(engine, 1, 12, 12, patience=1.0)
    stages = {"waiting": 0, "held": 0}
    busy = CALLERS

    async def use(stage: list[str], seconds: float) -> None:
        async with engine.connect() as connection:
            stage[0] = "held"
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(seconds)
        stage[0] = "done"

    async def caller(number: int) -> None:
        rng = random.Random(seed * 1_000 + number)
        while sum(stages.values()) < cancellations:
            if number >= busy:
                await asyncio.sleep(0.05)
                continue
            stage = ["waiting"]
            task = asyncio.create_task(use(stage, rng.random() * 0.03))
            await asyncio.sleep(rng.random() * 0.06)
            if task.cancel():
                was = stage[0]
                try:
                    await task
                except asyncio.CancelledError:
                    stages["waiting" if was == "waiting" else "held"] += 1
            else:
                await task

    async def crowds() -> None:
        nonlocal busy
        rng = random.Random(seed)
        while True:
            busy = rng.choice((1, 4, CALLERS))
            await asyncio.sleep(2.0)

    try:
        coming = asyncio.create_task(crowds())
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        coming.cancel()
        resizer: Any = sizing.sizing._resizer  # type: ignore[union-attr]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            probe.sample()
            used, idle = (
                writer.value("db_client_connection_count", **NAME, db_client_connection_state=state)
                for state in ("used", "idle")
            )
            found = await asyncio.to_thread(_open, postgres)
            if used == 0 and idle == found == resizer.places and not resizer.closing:
                break
            await asyncio.sleep(0.1)
        changes = sum(
            value for (name, _), value in writer.samples().items() if name == "headroom_pool_autosize_changes_total"
        )
        return Cancelled(stages["held"], stages["waiting"], changes, used, idle, resizer.places, found)
    finally:
        sizing.stop()
        probe.close()
        writer.close()
        await engine.dispose()


def _open(postgres: Postgres) -> int:
    engine = create_engine(postgres.url(driver="psycopg"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            return int(connection.execute(COUNT, {"name": APPLICATION}).scalar_one())
    finally:
        engine.dispose()
