"""Real servers for the tests, started once and only when a test asks for one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import hypothesis
import pytest

from demo_app.stack.mariadb import MariaDB
from demo_app.stack.servers import Postgres, Redis
from fastapi_headroom import ledger

hypothesis.settings.register_profile("whatever the machine", deadline=None)
hypothesis.settings.load_profile("whatever the machine")


def pytest_collection_finish() -> None:
    """Take what is there before the first test out of the garbage collector's sight.

    A collection of thousands of tests and all their modules stops the process for 0.3 s, in the middle of one of them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_request_left() -> Iterator[None]:
    """Name the test that leaves a request behind: it would be that of every later test of the process."""
    yield
    left = ledger.current.get()
    ledger.current.set(None)
    assert left is None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A real PostgreSQL on a free port."""
    base = tmp_path_factory.mktemp("servers")
    with Postgres(base / "postgres") as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A real Redis on a free port."""
    base = tmp_path_factory.mktemp("servers")
    with Redis(base / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A real MariaDB on a free port."""
    base = tmp_path_factory.mktemp("servers")
    with MariaDB(base / "mariadb") as server:
        yield server
