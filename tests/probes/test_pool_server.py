"""The server's limit of connections, read from real PostgreSQL over connections that the app opens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from demo_app.stack.mariadb import MariaDB
from demo_app.stack.servers import Postgres
from fastapi_headroom.probes import pool_server
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.pool_server import STATEMENTS
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

LIMIT = "headroom_database_connections_max"
POOL = "db_client_connection_pool_name"


def probe_with(writer: Writer, **settings: object) -> Iterator[PoolProbe]:
    probe = PoolProbe(load({}, **settings))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()


@pytest.fixture
def probe(writer: Writer) -> Iterator[PoolProbe]:
    yield from probe_with(writer)


def expected(engine: Engine) -> float:
    """Return the limit by a way of its own: the settings, one by one."""
    with engine.connect() as connection:
        settings = {row.name: row.setting for row in connection.execute(text("SELECT name, setting FROM pg_settings"))}
    reserved = int(settings["superuser_reserved_connections"]) + int(settings.get("reserved_connections", 0))
    return float(int(settings["max_connections"]) - reserved)


def limit_of(writer: Writer) -> float | None:
    for (name, labels), value in writer.samples().items():
        if name == LIMIT and dict(labels)[POOL] == "shop":
            return value
    return None


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_limit_is_max_connections_less_what_is_reserved(
    driver: str, postgres: Postgres, writer: Writer, probe: PoolProbe
) -> None:
    """The first connection that a pool opens tells it, and is handed out outside of any transaction."""
    engine = create_engine(postgres.url(driver=driver), pool_logging_name="shop")
    raw = engine.raw_connection()
    assert limit_of(writer) is not None
    told: Any = raw.driver_connection
    assert int(told.info.transaction_status) == 0  # idle, not in a transaction
    raw.close()
    assert limit_of(writer) == expected(engine)
    engine.dispose()


async def test_an_async_engine_tells_it_too(postgres: Postgres, writer: Writer, probe: PoolProbe) -> None:
    """asyncpg's first connection tells the limit, within the greenlet that opens it."""
    engine = create_async_engine(postgres.url(driver="asyncpg"), pool_logging_name="shop")
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT 1"))).scalar() == 1
    await engine.dispose()
    plain = create_engine(postgres.url(driver="psycopg"))
    assert limit_of(writer) == expected(plain)
    plain.dispose()


def test_mysql_tells_the_tighter_limit_of_an_account(mariadb: MariaDB, writer: Writer, probe: PoolProbe) -> None:
    """PyMySQL's first connection tells max_user_connections where that is below max_connections."""
    engine = create_engine(mariadb.url(driver="pymysql"), pool_logging_name="shop")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT @@max_user_connections")).scalar() == 90
    assert limit_of(writer) == 90
    engine.dispose()


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
async def test_mysql_tells_its_limit_by_an_async_driver(
    driver: str, mariadb: MariaDB, writer: Writer, probe: PoolProbe
) -> None:
    """max_connections, asked within the greenlet that opens; the one reserved for administration comes on top."""
    admin = create_engine(mariadb.url(driver="pymysql"))
    with admin.connect() as connection:
        connection.execute(text("SET GLOBAL max_user_connections = 200"))
    try:
        engine = create_async_engine(mariadb.url(driver=driver), pool_logging_name="shop")
        async with engine.connect() as open_one:
            assert (await open_one.execute(text("SELECT @@max_connections"))).scalar() == 100
        await engine.dispose()
    finally:
        with admin.connect() as connection:
            connection.execute(text("SET GLOBAL max_user_connections = 90"))
    assert limit_of(writer) == 100
    admin.dispose()


def test_a_tighter_limit_of_the_database_or_role_counts(postgres: Postgres, writer: Writer, probe: PoolProbe) -> None:
    """ALTER DATABASE and ALTER ROLE ... CONNECTION LIMIT are limits of the server as well."""
    for what in ("DATABASE", "ROLE"):
        admin = create_engine(postgres.url(driver="psycopg"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            name = connection.execute(
                text("SELECT current_database()" if what == "DATABASE" else "SELECT session_user")
            )
            quoted = '"' + str(name.scalar()) + '"'
            connection.execute(text(f"ALTER {what} {quoted} CONNECTION LIMIT 17"))
            try:
                engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
                engine.connect().close()
                engine.dispose()
            finally:
                connection.execute(text(f"ALTER {what} {quoted} CONNECTION LIMIT -1"))
        admin.dispose()
        assert limit_of(writer) == 17.0


def test_it_is_asked_once_per_pool_and_not_by_checkouts(
    postgres: Postgres, writer: Writer, probe: PoolProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten connections and thirty checkouts ask once; after dispose() the new pool asks once again."""
    asked: list[float | None] = []
    ask = pool_server._ask
    monkeypatch.setattr(pool_server, "_ask", lambda *args: asked.append(ask(*args)) or asked[-1])
    engine = create_engine(postgres.url(driver="psycopg"), pool_size=10, pool_logging_name="shop")
    for _ in range(3):
        for connection in [engine.connect() for _ in range(10)]:
            connection.close()
    assert len(asked) == 1
    engine.dispose()
    for connection in [engine.connect() for _ in range(3)]:
        connection.close()
    assert asked == [limit_of(writer)] * 2
    engine.dispose()


def test_a_server_that_refuses_costs_no_request_and_is_no_failure(
    postgres: Postgres, writer: Writer, probe: PoolProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the statement fails the connection works, no series is written and the probe stays up."""
    monkeypatch.setitem(STATEMENTS, "postgresql", "SELECT no_such_function()")
    engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()
    assert limit_of(writer) is None


def test_nothing_is_asked_where_the_setting_is_off(postgres: Postgres, writer: Writer) -> None:
    """read_database_limit=False: no statement, no series."""
    for _ in probe_with(writer, read_database_limit=False):
        engine = create_engine(postgres.url(driver="psycopg"), pool_logging_name="shop")
        engine.connect().close()
        engine.dispose()
        assert limit_of(writer) is None


def test_a_database_that_has_no_such_limit_has_no_series(writer: Writer, probe: PoolProbe) -> None:
    """SQLite is not asked."""
    engine = create_engine("sqlite://", pool_logging_name="shop")
    engine.connect().close()
    assert limit_of(writer) is None
