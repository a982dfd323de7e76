"""An app with a pool of one connection, measured and traced, and a route that says what its process imported."""

from __future__ import annotations

import os
import sys
import time

from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import fastapi_headroom as headroom
from fastapi_headroom.tracing import spans

app = FastAPI()
engine = create_async_engine(os.environ["TEST_DATABASE_URL"], pool_size=1, max_overflow=0)


@app.get("/read/{number}")
async def read(number: int) -> int:
    """Read with a bound value."""
    async with engine.connect() as connection:
        return int(await connection.scalar(text("SELECT CAST(:number AS integer)"), {"number": number}) or 0)


@app.get("/hold")
async def hold(seconds: float) -> None:
    """Keep the only connection busy."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


@app.get("/checked-out")
async def checked_out() -> int:
    """Return how many connections are in use."""
    return int(engine.pool.checkedout())  # type: ignore[attr-defined]


@app.get("/block")
async def block(kind: str) -> None:
    """Hold the event loop for 0.3 s and answer in the same step."""
    if kind == "sleep":
        time.sleep(0.3)  # noqa: ASYNC251
    else:
        sum(range(40_000_000))  # one call in C that keeps the GIL: the watchdog cannot look before it is over


@app.get("/imported")
async def imported() -> dict[str, bool]:
    """Return what the process has loaded for traces."""
    return {
        "sdk": any(name.startswith("opentelemetry.sdk") for name in sys.modules),
        "instrumentation": any(name.startswith("opentelemetry.instrumentation") for name in sys.modules),
        "active": spans.active,
    }


headroom.init(app)
