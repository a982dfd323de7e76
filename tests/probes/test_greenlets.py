"""SQLAlchemy's async sessions run their sync part in greenlets: blocks there have a site all the same."""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import JSON, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_headroom.driver import Driven
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.blocks import Block
from tests.probes.loops import BLOCKS, RUNS, Run, measured, objects_that_take, total, undisturbed, until
from tests.support.measured import best_of

pytestmark = pytest.mark.alone

HERE = __name__
Fault = Callable[[AsyncSession], Awaitable[None]]


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def library_code() -> dict[str, Any]:
    """Return functions that count as a library's: their file lies among the installed packages."""
    namespace: dict[str, Any] = {"__name__": "driver", "time": time, "gc": gc}
    source = "def pause(_):\n    time.sleep(0.25)\ndef collect(_):\n    gc.collect()\n"
    exec(compile(source, "/usr/lib/python3/dist-packages/driver.py", "exec"), namespace)
    return namespace


LIBRARY = library_code()


@asynccontextmanager
async def a_session(rows: int = 0) -> AsyncIterator[AsyncSession]:
    """A session on SQLite in memory, with one large JSON document of that many rows in table ``documents``."""
    engine = create_async_engine("sqlite+aiosqlite://")
    try:
        async with AsyncSession(engine) as session:
            await session.execute(text("CREATE TABLE documents (body JSON)"))
            body = "[" + ",".join(['{"a": [1, 2, 3, 4, 5, 6, 7, 8]}'] * rows) + "]"
            await session.execute(text("INSERT INTO documents VALUES (:body)"), {"body": body})
            yield session
    finally:
        await engine.dispose()


async def read_a_large_document(session: AsyncSession) -> None:
    await session.scalar(text("SELECT body FROM documents").columns(body=JSON))


async def sleep_in_a_library(session: AsyncSession) -> None:
    await session.run_sync(LIBRARY["pause"])


async def collect_in_a_library(session: AsyncSession) -> None:
    await session.run_sync(LIBRARY["collect"])


def sync_part(_: object) -> None:
    time.sleep(0.25)


async def run_sync_part(session: AsyncSession) -> None:
    await session.run_sync(sync_part)


def on_execute(*_: object) -> None:
    time.sleep(0.25)


async def run_a_slow_listener(session: AsyncSession) -> None:
    connection = await session.connection()
    event.listen(connection.sync_connection, "before_cursor_execute", on_execute)
    await connection.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("fault", "site", "cause"),
    [
        (sleep_in_a_library, "sleep_in_a_library", "io"),
        (collect_in_a_library, "collect_in_a_library", "gc"),
        (run_sync_part, "sync_part", "io"),
        (run_a_slow_listener, "on_execute", "io"),
    ],
)
def test_block_in_a_greenlet(run: Run, fault: Fault, site: str, cause: str) -> None:
    """The site is the deepest frame of the user's code, be it in the greenlet or in the coroutine that waits for it."""
    knots = objects_that_take(0.2) if cause == "gc" else []

    async def main() -> None:
        async with a_session() as session:
            await fault(session)

    found = undisturbed(run, main)
    del knots
    (name, why), _ = max(found.items(), key=lambda item: item[1])
    assert (name.rpartition(":")[0], why) == (f"{HERE}:{site}", cause), found


def test_slow_result_processor(run: Run) -> None:
    """A large JSON column is decoded in C in the greenlet, with the GIL kept: native, at the coroutine that read it.

    Or at nobody, when the driver's thread is given the GIL first: it waits for it, too.
    """

    async def main() -> None:
        async with a_session(rows=250_000) as session:
            await read_a_large_document(session)

    def blamed() -> dict[str, str]:
        found = undisturbed(run, main)
        return {name.rpartition(":")[0]: cause for (name, cause), seconds in found.items() if seconds > 0.05}

    read = f"{HERE}:read_a_large_document"
    assert best_of(blamed, lambda found: read in found)[read] == "native"


def test_route_of_a_block_in_a_greenlet(run: Run) -> None:
    """The request that was served is known although the step driver is not on the greenlet's stack."""
    seen: list[Block] = []

    async def main() -> None:
        async with a_session() as session, measured() as (writer, probe):
            request = Ledger("GET")
            request.route = "/documents/{id}"
            await Driven(sleep_in_a_library(session), request)
            await until(lambda: total(writer, BLOCKS) == 1)
            assert probe._watchdog is not None
            seen.extend(probe._watchdog.recent)

    run(main())
    (block,) = seen
    assert block.sample is not None and block.sample.ledger is not None
    assert block.sample.ledger.route == "/documents/{id}"
    assert any("sleep_in_a_library" in line for line in block.sample.stack), "the stack goes on in the coroutine"
