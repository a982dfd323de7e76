"""Fixtures that the tests of the probes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo_app.stack.mariadb import MariaDB
from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.drivers import MYSQL
from tests.support.measured import Measured


@pytest.fixture
def measure() -> Iterator[Callable[..., Measured]]:
    """Put apps under probes that are closed afterwards."""
    opened: list[Measured] = []

    def make(app: Any, **arguments: Any) -> Measured:
        opened.append(Measured(app, **arguments))
        return opened[-1]

    yield make
    for measured in opened:
        measured.probe.close()


@pytest.fixture
def writer() -> Writer:
    """A store in memory."""
    return Writer.in_memory()


@pytest.fixture
def pool_probe(request: pytest.FixtureRequest, writer: Writer) -> Iterator[PoolProbe]:
    """The pool probe, which must not have failed by the end; ``indirect`` parameters are its settings."""
    probe = PoolProbe(load({}, **getattr(request, "param", {})))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture
def measured() -> Iterator[Writer]:
    """A bound queue probe; gives what it writes to."""
    writer, probe = Writer.in_memory(), QueueProbe(load({}))
    probe.bind(writer)
    yield writer
    probe.close()


@pytest.fixture
def driver() -> str:
    """The driver of a test that does not choose."""
    return "psycopg"


@pytest.fixture
def url(driver: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a real database for the test's driver, whose server is started if need be."""
    if driver == "aiosqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"
    server: Postgres | MariaDB = request.getfixturevalue("mariadb" if driver in MYSQL else "postgres")
    return server.url(driver=driver.partition("-")[0])
