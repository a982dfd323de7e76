"""A small app for tests that run real servers."""

from __future__ import annotations

import asyncio
import os
import time

from fastapi import FastAPI

import fastapi_headroom as headroom

app = FastAPI()


@app.get("/ping")
async def ping() -> dict[str, int]:
    return {"pid": os.getpid()}


@app.get("/items/{item_id}")
async def item(item_id: int) -> dict[str, int]:
    return {"item": item_id}


@app.get("/sleep")
async def sleep(seconds: float = 0.1) -> dict[str, float]:
    await asyncio.sleep(seconds)
    return {"slept": seconds}


@app.get("/block")
async def block(seconds: float = 0.3) -> dict[str, float]:
    time.sleep(seconds)  # noqa: ASYNC251 - the fault
    return {"blocked": seconds}


@app.get("/outside")
async def outside(url: str) -> dict[str, int]:
    import httpx  # later than init

    async with httpx.AsyncClient() as client:
        return {"status": (await client.get(url)).status_code}


@app.get("/error")
async def error() -> None:
    raise ValueError("the fault")


headroom.init(app)
