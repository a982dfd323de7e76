"""Workers that share a budget are killed at random, while the server is asked how many connections it has."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import create_engine, text

from demo_app.stack.servers import Postgres
from tests.support.autosize_worker import APPLICATION, BUDGET, WORKERS

COUNT = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")


class Outcome(NamedTuple):
    """What was seen: by looks at the server, and of the workers at the end."""

    looks: int
    most: int
    kills: int
    places: list[tuple[int, int, int]]
    """Of each worker at rest: places, of which in use, and closing."""
    open_at_rest: int


def start(number: int, directory: Path, postgres: Postgres, seed: int) -> subprocess.Popen[str]:
    """Start a worker: even ones are async, odd ones have threads."""
    kind, driver = ("async", "asyncpg") if number % 2 == 0 else ("threads", "psycopg")
    return subprocess.Popen(
        [
            sys.executable, "-m", "tests.support.autosize_worker", kind, str(directory), postgres.url(driver=driver),
            str(seed),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_at_random(
    directory: Path, postgres: Postgres, *, seconds: float, seed: int, kills_at_least: int = 0
) -> Outcome:
    """Kill and restart workers for a while and so often at least, then let all rest and ask what is open."""
    rng = random.Random(seed)
    engine = create_engine(postgres.url(driver="psycopg"), isolation_level="AUTOCOMMIT")
    stop, seen = threading.Event(), []

    def watch() -> None:
        with engine.connect() as connection:
            while not stop.wait(0.01):
                seen.append(int(connection.execute(COUNT, {"name": APPLICATION}).scalar_one()))

    watcher = threading.Thread(target=watch)
    workers = [start(number, directory, postgres, number) for number in range(WORKERS)]
    watcher.start()
    kills = 0
    try:
        for worker in workers:
            _expect(worker, "ready")
        until = time.monotonic() + seconds
        while time.monotonic() < until or kills < kills_at_least:
            time.sleep(rng.random() * 2)
            victim = rng.randrange(WORKERS)
            workers[victim].kill()
            workers[victim].communicate()
            kills += 1
            workers[victim] = start(victim, directory, postgres, 100 + kills)
            _expect(workers[victim], "ready")
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("rest\n")
            worker.stdin.flush()
        places = [_numbers(worker) for worker in workers]
        with engine.connect() as connection:
            open_at_rest = int(connection.execute(COUNT, {"name": APPLICATION}).scalar_one())
    finally:
        stop.set()
        watcher.join()
        for worker in workers:
            worker.kill()
            worker.communicate()
        engine.dispose()
    assert max(seen) <= BUDGET, f"{max(seen)} connections at once, of a budget of {BUDGET}"
    return Outcome(len(seen), max(seen), kills, places, open_at_rest)


def _expect(worker: subprocess.Popen[str], word: str) -> None:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    assert line.strip() == word, f"the worker said {line!r}"


def _numbers(worker: subprocess.Popen[str]) -> tuple[int, int, int]:
    assert worker.stdout is not None
    places, used, closing = map(int, worker.stdout.readline().split())
    return places, used, closing
