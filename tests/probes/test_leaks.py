"""Connections that nobody will give back are found and shown by route, and no others, against real PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.store.writer import Writer
from tests.support.measured import Measured

THRESHOLD = 0.6
pytestmark = pytest.mark.parametrize("pool_probe", [{"hold_threshold": THRESHOLD}], indirect=True)


@pytest.fixture
async def engine(postgres: Postgres) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(postgres.url(driver="asyncpg"), pool_size=3, max_overflow=0, pool_logging_name="shop")
    yield engine
    await engine.dispose()


@pytest.fixture
def look(pool_probe: PoolProbe, writer: Writer) -> Callable[[], dict[str, float]]:
    """Look as the sampling thread does; return the leaked connections by route."""

    def look() -> dict[str, float]:
        pool_probe.sample()
        found = {}
        for (name, labels), value in writer.samples().items():
            if name == "headroom_pool_leaked_connections":
                found[dict(labels)["http_route"]] = value
        return found

    return look


@pytest.fixture
def app() -> Iterator[tuple[FastAPI, Measured]]:
    """An app under the request probe."""
    app = FastAPI()
    measured = Measured(app)
    yield app, measured
    measured.probe.close()


async def past_the_threshold() -> None:
    await asyncio.sleep(THRESHOLD + 0.05)


async def test_a_session_that_a_request_has_left_open_is_a_leak_until_it_is_closed(
    engine: AsyncEngine, app: tuple[FastAPI, Measured], look: Callable[[], dict[str, float]]
) -> None:
    """A handler that keeps its sessions leaks one each; there is no series before, and 0 once they are closed."""
    api, measured = app
    kept: list[AsyncSession] = []

    @api.get("/leaks/{number}")
    async def leak(number: int) -> int:
        kept.append(AsyncSession(engine))
        await kept[-1].execute(text("select 1"))
        return number

    for number in range(2):
        assert (await asyncio.create_task(measured.get(f"/leaks/{number}"))).json() == number
    assert look() == {}
    await past_the_threshold()
    assert await asyncio.to_thread(look) == {"/leaks/{number}": 2}
    for session in kept:
        await session.close()
    assert look() == {"/leaks/{number}": 0}


async def test_a_stream_and_a_background_task_leak_nothing(
    engine: AsyncEngine, app: tuple[FastAPI, Measured], look: Callable[[], dict[str, float]]
) -> None:
    """A response that streams, and work after a response, may hold a connection for as long as they last."""
    api, measured = app
    held, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def hold() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            held.release()
            await go_on.wait()

    @api.get("/stream")
    async def stream() -> StreamingResponse:
        async def rows() -> AsyncIterator[bytes]:
            yield b"first"
            await hold()
            yield b"last"

        return StreamingResponse(rows())

    @api.get("/background")
    async def background(tasks: BackgroundTasks) -> int:
        tasks.add_task(hold)
        return 1

    requests = [asyncio.create_task(measured.get(path)) for path in ("/stream", "/background")]
    for _ in requests:
        await held.acquire()
    await past_the_threshold()
    assert await asyncio.to_thread(look) == {}
    go_on.set()
    await asyncio.gather(*requests)


async def test_what_a_task_within_a_request_has_checked_out_is_no_leak_before_the_request_ends(
    engine: AsyncEngine, app: tuple[FastAPI, Measured], look: Callable[[], dict[str, float]]
) -> None:
    """A checkout in a task of its own, as by wait_for before Python 3.12, belongs to the request that goes on."""
    api, measured = app
    kept: list[Any] = []
    go_on = asyncio.Event()

    @api.get("/report")
    async def report() -> int:
        kept.append(await asyncio.create_task(engine.connect().start()))
        await go_on.wait()
        return 1

    request = asyncio.create_task(measured.get("/report"))
    async with asyncio.timeout(30):
        while not kept:
            await asyncio.sleep(0.01)
    await past_the_threshold()
    assert await asyncio.to_thread(look) == {}
    go_on.set()
    await request
    assert look() == {"/report": 1}
    await kept[0].close()


async def test_sync_endpoints_leak_by_what_they_keep_and_not_by_what_they_do(
    postgres: Postgres, app: tuple[FastAPI, Measured], look: Callable[[], dict[str, float]]
) -> None:
    """In threads of the pool, which live on: a session kept is a leak, one still in use by its function is none."""
    api, measured = app
    engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
    kept: list[Session] = []
    held, go_on = threading.Event(), threading.Event()

    def load(session: Session) -> None:
        session.execute(text("select 1"))

    @api.get("/leaks")
    def leak() -> int:
        kept.append(Session(engine))
        load(kept[-1])
        return 1

    @api.get("/works")
    def work() -> int:
        with Session(engine) as session:
            load(session)
            held.set()
            go_on.wait(60)
        return 1

    assert (await measured.get("/leaks")).json() == 1
    working = asyncio.create_task(measured.get("/works"))
    await asyncio.to_thread(held.wait, 60)
    await past_the_threshold()
    assert await asyncio.to_thread(look) == {"/leaks": 1}
    go_on.set()
    await working
    kept[0].close()
    engine.dispose()


def test_a_thread_that_has_ended_has_leaked_and_one_that_lives_is_not_accused(
    postgres: Postgres, look: Callable[[], dict[str, float]]
) -> None:
    """Outside of requests the end of the thread is the proof; a thread that lives may still need its connection."""
    engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
    kept: list[Any] = []
    go_on = threading.Event()

    def take() -> None:
        kept.append(engine.connect())

    def live() -> None:
        take()
        go_on.wait(60)

    ended, living = threading.Thread(target=take), threading.Thread(target=live)
    living.start()
    ended.start(), ended.join()
    go_on.wait(THRESHOLD + 0.05)
    assert look() == {"_outside": 1}
    go_on.set()
    living.join()
    for connection in kept:
        connection.close()
    assert look() == {"_outside": 0}
    engine.dispose()


async def test_a_connection_that_others_work_with_is_no_leak(
    engine: AsyncEngine, look: Callable[[], dict[str, float]]
) -> None:
    """One opened by a task that has ended counts only while no statement runs on it for the threshold's time."""
    connection = await asyncio.create_task(engine.connect().start())
    await past_the_threshold()
    look()
    await connection.execute(text("select 1"))
    assert look() == {"_outside": 0}
    await past_the_threshold()
    assert look() == {"_outside": 1}
    await connection.close()
