"""An app whose waits, holds and tokens last as long as the test says: what the ledger tells can be checked."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Request, Response
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.concurrency import run_in_threadpool

import fastapi_headroom as headroom

SLEEP = text("select pg_sleep(:seconds)")
ROUTES = 10
engines = {
    name: create_async_engine(os.environ[variable], pool_size=3, max_overflow=0)
    for name, variable in (("tcp", "TRUTH_POSTGRES"), ("unix", "TRUTH_POSTGRES_UNIX"))
    if variable in os.environ
}
cache = Redis.from_url(os.environ["TRUTH_REDIS"]) if "TRUTH_REDIS" in os.environ else None
waits = asyncio.Event()
"""Set when a request is about to wait."""
holders = 0
"""Requests that are ready to hold the loop."""
background: set[asyncio.Task[Any]] = set()

app = FastAPI()


def busy(seconds: float) -> None:
    """Hold the thread."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


async def query(engine: AsyncEngine, seconds: float) -> None:
    """Run a statement that takes so long."""
    async with engine.connect() as connection:
        await connection.execute(SLEEP, {"seconds": seconds})


async def wait_for(kind: str, seconds: float) -> None:
    """Wait for the answer of a database or cache."""
    if kind == "redis":
        assert cache is not None
        await cache.execute_command("DEBUG", "SLEEP", str(seconds))
    else:
        await query(engines[kind], seconds)


@app.get("/warm/{kind}")
async def warm(kind: str) -> None:
    """Open connections and prepare the statement."""
    await asyncio.gather(*(wait_for(kind, 0.001) for _ in range(2)))


@app.get("/wait/{kind}")
async def wait(kind: str, seconds: float) -> None:
    """Wait, once somebody is ready to hold the loop meanwhile."""
    while not holders:
        await asyncio.sleep(0.001)
    waits.set()
    await wait_for(kind, seconds)


@app.get("/hold")
async def hold(seconds: float, times: int = 1, after: float = 0.005) -> None:
    """Hold the loop so many times, with a pause before each, from when another request waits."""
    global holders
    holders += 1
    await waits.wait()
    waits.clear()
    holders -= 1
    for _ in range(times):
        await asyncio.sleep(after)
        busy(seconds)


@app.get("/hold-by-callback")
async def hold_by_callback(seconds: float) -> None:
    """Have the loop held by a callback that belongs to no request, from when another request waits."""
    global holders
    holders += 1
    await waits.wait()
    waits.clear()
    holders -= 1
    await block_by_callback(seconds)


@app.get("/block-by-callback")
async def block_by_callback(seconds: float) -> None:
    """Have it held at once."""
    asyncio.get_running_loop().call_later(0.005, busy, seconds, context=Context())


@app.get("/crowd")
async def crowd(of: str, tasks: int = 50, seconds: float = 0.002, rounds: int = 8) -> None:
    """Keep the loop busy by many tasks with short steps: the request's own, or such as belong to no request."""
    global holders

    async def member() -> None:
        for _ in range(rounds):
            busy(seconds)
            await asyncio.sleep(0)

    async def gathered() -> None:
        await asyncio.gather(*(member() for _ in range(tasks)))

    holders += 1
    await waits.wait()
    waits.clear()
    holders -= 1
    if of == "request":
        await gathered()
    else:
        assert crowds is not None
        crowds.put_nowait(gathered)


crowds: asyncio.Queue[Callable[[], Awaitable[None]]] | None = None


@app.get("/start")
async def start() -> None:
    """Start the task that belongs to no request."""
    global crowds
    if crowds is None:
        crowds = asyncio.Queue()
        queue = crowds

        async def work() -> None:
            while True:
                await (await queue.get())()

        background.add(asyncio.create_task(work(), context=Context()))


@app.get("/block")
async def block(seconds: float) -> None:
    """Hold the loop at once."""
    busy(seconds)


def add_ping(number: int) -> None:
    """Add a route that answers at once and has books of its own."""

    @app.get(f"/ping{number}")
    async def ping() -> str:
        return "pong"


for each in range(ROUTES):
    add_ping(each)


@app.post("/upload")
async def upload(request: Request) -> int:
    """Read a body to its end."""
    return len(await request.body())


@app.get("/pooled")
async def pooled(seconds: float) -> None:
    """Hold one of the pool's three connections."""
    await query(engines["tcp"], seconds)


@app.get("/wait-for-pool")
async def wait_for_pool() -> None:
    """Want one of them."""
    await query(engines["tcp"], 0.001)


@app.get("/threads/{tokens}")
async def threads(tokens: int) -> None:
    """Set the number of threads."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = tokens


@app.get("/sync")
def sync(seconds: float) -> None:
    """Occupy a thread."""
    time.sleep(seconds)


@app.get("/pool-of-threads")
async def pool_of_threads(seconds: float) -> None:
    """Occupy a thread from a coroutine."""
    await run_in_threadpool(time.sleep, seconds)


def dependency() -> None:
    """Be run in a thread, as sync dependencies are."""
    time.sleep(0.02)


@app.get("/dependent")
async def dependent(_: Annotated[None, Depends(dependency)]) -> None:
    """Compute after a dependency that ran in a thread."""
    busy(0.02)


if os.environ.get("TRUTH_MIDDLEWARE"):

    @app.middleware("http")
    async def passing(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Do nothing, in the way that makes a task of each request."""
        return await call_next(request)


headroom.init(app)
