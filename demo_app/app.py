"""The shop. Run it with ``uvicorn demo_app.app:app --workers 2``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.middleware.gzip import GZipMiddleware

import fastapi_headroom as headroom
from demo_app import outside
from demo_app.cache import changes, client, near, west_client
from demo_app.database import engine
from demo_app.routers import mail, orders, plans, products, reports, users


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Listen to what changes; give connections back when the worker stops."""
    listening = asyncio.create_task(changes.listen())
    yield
    listening.cancel()
    await outside.client.aclose()
    await client.aclose()
    await west_client.aclose()
    await engine.dispose()


app = FastAPI(title="Shop", lifespan=lifespan)
app.add_middleware(GZipMiddleware, minimum_size=1_000)
for module in (products, users, orders, plans, reports, mail):
    app.include_router(module.router)

headroom.init(app, pools={"primary": engine}, caches={"redis": client, "redis-west": west_client, "near": near})


@app.exception_handler(PoolTimeoutError)
async def turn_away(_: Request, __: PoolTimeoutError) -> JSONResponse:
    """Tell clients to come back when the pool has no connection for them."""
    return JSONResponse({"detail": "too busy"}, 503, headers={"Retry-After": "2"})


@app.get("/healthz", include_in_schema=False)
async def healthz() -> dict[str, str]:
    """Say that the worker serves."""
    return {"status": "ok"}
