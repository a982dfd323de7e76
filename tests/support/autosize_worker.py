"""A worker whose pool is autosized under a random demand, until it is killed, or told on stdin to rest and to report.

python -m tests.support.autosize_worker async|threads DIRECTORY URL SEED
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

import fastapi_headroom as headroom
from fastapi_headroom.probes import pool_autosize

APPLICATION = "headroom-autosize"
MINIMUM, MAXIMUM, BUDGET, WORKERS = 1, 10, 12, 4
STATEMENT = text("SELECT pg_sleep(0.01)")
_resting = threading.Event()


def measured(engine: Any, directory: Path) -> Any:
    """Size an engine's pool, and measure it."""
    pool_autosize.TICK = 0.1  # type: ignore[misc]
    sizing = headroom.autosize(engine, MINIMUM, MAXIMUM, BUDGET, workers=WORKERS, patience=1.0)
    headroom.init_worker(directory=directory, exporter=False, tracing=False)
    threading.Thread(target=_listen, daemon=True).start()
    print("ready", flush=True)
    return sizing


def _listen() -> None:
    sys.stdin.readline()
    _resting.set()


def report(sizing: Any) -> None:
    """Tell how many places the pool has when nothing of it is in use or closing any more, and wait to be killed."""
    time.sleep(0.5)
    deadline = time.monotonic() + 20
    while (sizing.sizing._resizer.used or sizing.sizing._resizer.closing) and time.monotonic() < deadline:
        time.sleep(0.02)
    resizer = sizing.sizing._resizer
    print(f"{resizer.places} {resizer.used} {resizer.closing}", flush=True)
    sys.stdin.readline()


async def serve(directory: Path, url: str, rng: random.Random) -> None:
    """Run callers of an async engine, some of which are cancelled."""
    engine = create_async_engine(
        url, pool_timeout=30, pool_logging_name="shop",
        connect_args={"server_settings": {"application_name": APPLICATION}},
    )  # fmt: skip
    sizing = measured(engine, directory)

    async def use() -> None:
        async with engine.connect() as connection:
            await connection.execute(STATEMENT)
            await asyncio.sleep(rng.random() * 0.1)

    while not _resting.is_set():
        tasks = [asyncio.create_task(use()) for _ in range(rng.choice((1, 3, 8, 20)))]
        await asyncio.sleep(rng.random() * 0.2)
        for task in tasks:
            if rng.random() < 0.2:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(report, sizing)


def serve_threads(directory: Path, url: str, rng: random.Random) -> None:
    """Run eight threads on a sync engine, of which more and fewer work."""
    engine = create_engine(
        url, pool_timeout=30, pool_logging_name="shop", connect_args={"application_name": APPLICATION}
    )
    sizing = measured(engine, directory)
    busy = 8

    def use(number: int) -> None:
        while not _resting.is_set():
            if number >= busy:
                time.sleep(0.02)
                continue
            with engine.connect() as connection:
                connection.execute(STATEMENT)
                time.sleep(rng.random() * 0.1)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while not _resting.wait(0.5):
        busy = rng.choice((1, 4, 8))
    for thread in threads:
        thread.join()
    report(sizing)


if __name__ == "__main__":
    kind, directory_, url_, seed = sys.argv[1:]
    if kind == "async":
        asyncio.run(serve(Path(directory_), url_, random.Random(seed)))
    else:
        serve_threads(Path(directory_), url_, random.Random(seed))
