"""Neither user nor password of a SQLAlchemy URL shows in names, labels, files or logs, wherever in it they stand."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some
from sqlalchemy import create_engine, exc, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import QueuePool

import fastapi_headroom as headroom
from demo_app.stack.servers import Postgres, free_port
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.pool_names import derive_name
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.drivers import KILLED

USER, PASSWORD = "zoe_login", "hunter2 @:/?&%"
QUOTED = "hunter2%20%40%3A%2F%3F%26%25"
SECRETS = (USER, "hunter2")
URLS = (
    "{driver}://{user}:{password}@{host}:{port}/postgres",
    "{driver}://{user}:{password}@/postgres?host={host}&port={port}",
    "{driver}:///postgres?host={host}&port={port}&user={user}&password={password}",
    "{driver}://{host}:{port}/postgres?user={user}&password={password}",
)
words = some.text(some.characters(codec="ascii", categories=("L", "N", "P", "S")), max_size=8)


@given(
    template=some.sampled_from((
        *URLS,
        "mssql+pyodbc:///?odbc_connect=DRIVER=x;SERVER={host};UID={user};PWD={password}",
        "mysql+aiomysql://{user}:{password}@{host}:{port}/postgres?charset=utf8",
        "sqlite:////home/{user}/orders.db?password={password}",
    )),
    user=words, password=words,
)  # fmt: skip
def test_no_name_is_made_of_user_or_password(template: str, user: str, password: str) -> None:
    """Whatever the two are made of, the name of the pool has neither."""
    from urllib.parse import quote

    url = make_url(
        template.format(
            driver="postgresql+psycopg", host="db", port=5432,
            user=quote(f"QZUSER{user}", safe=""), password=quote(f"QZPASS{password}", safe=""),
        )
    )  # fmt: skip

    class Engine:
        pass

    engine = Engine()
    engine.url = url  # type: ignore[attr-defined]
    name = derive_name(QueuePool(lambda: None), engine)  # type: ignore[arg-type, return-value]
    assert "QZ" not in name


@pytest.fixture(scope="module")
def login(postgres: Postgres) -> Postgres:
    """A server on which the user may log in."""
    engine = create_engine(postgres.url(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"DROP ROLE IF EXISTS {USER}"))
        connection.execute(text(f"CREATE ROLE {USER} LOGIN PASSWORD 'hunter2'"))
    engine.dispose()
    return postgres


@pytest.mark.parametrize("template", URLS, ids=["authority", "host in query", "all in query", "user in query"])
def test_neither_shows_in_metrics_or_logs_of_a_sync_engine(
    login: Postgres, template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Used, autosized, held for long, exhausted and unable to connect: all that is written is free of both."""
    caplog.set_level(logging.DEBUG, "fastapi_headroom")
    writer, probe = Writer.open(tmp_path), PoolProbe(load({"HEADROOM_HOLD_THRESHOLD": "0.05"}, directory=tmp_path))
    probe.bind(writer)
    places = {"driver": "postgresql+psycopg", "user": USER, "password": QUOTED, "host": "127.0.0.1"}
    engine = create_engine(template.format(port=login.port, **places), pool_size=1, max_overflow=0, pool_timeout=0.02)
    nowhere = create_engine(template.format(port=free_port(), **places))
    try:
        sizing = headroom.autosize(engine, 1, 1, 1)
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_sleep(0.1)"))
            with pytest.raises(exc.TimeoutError):
                engine.connect()
            probe.sample()
        with pytest.raises(exc.OperationalError):
            nowhere.connect()
        probe.sample()
        sizing.stop()
        shown = [str(sample) for sample in writer.samples()]
        assert any("db_client_connection_wait_time" in line and "postgres@127.0.0.1" in line for line in shown), shown
        files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        said = [record.getMessage() + str(record.exc_text or record.exc_info or "") for record in caplog.records]
        assert any("held for" in line for line in said) and any("follows its load" in line for line in said), said
        names = [path.name for path in tmp_path.rglob("*")]
        for secret in SECRETS:
            assert secret.encode() not in files
            assert not [line for line in (*shown, *said, *names) if secret in line]
    finally:
        probe.close()
        writer.close()
        engine.dispose()
        nowhere.dispose()


async def test_neither_shows_of_an_async_engine(login: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """The same of asyncpg, whose user is in the URL and whose connection breaks while it is in use."""
    caplog.set_level(logging.DEBUG, "fastapi_headroom")
    writer, probe = Writer.in_memory(), PoolProbe(load({}))
    probe.bind(writer)
    url = URLS[0].format(driver="postgresql+asyncpg", user=USER, password=QUOTED, host="127.0.0.1", port=login.port)
    engine = create_async_engine(url)
    try:
        with pytest.raises(KILLED):
            async with asyncio.timeout(10), engine.connect() as connection:
                await connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        probe.sample()
        shown = [str(sample) for sample in writer.samples()]
        assert any("postgres@127.0.0.1" in line for line in shown)
        said = [record.getMessage() for record in caplog.records]
        assert not [line for line in (*shown, *said) for secret in SECRETS if secret in line]
    finally:
        probe.close()
        await engine.dispose()
