"""What is said of a connection's memory on the server is of the size that real servers take for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean

import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from demo_app.stack.mariadb import MariaDB
from demo_app.stack.servers import Postgres
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.store.writer import Writer

TABLES, CONNECTIONS = 10, 20


def proportional(pid: int) -> int:
    """Return the bytes of a process, of what it shares its share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def told(writer: Writer) -> float:
    return writer.value("headroom_database_connection_bytes", db_client_connection_pool_name="shop")


@contextmanager
def ten_tables(url: str) -> Iterator[Engine]:
    """Make tables with some rows, which one connection has read."""
    engine = create_engine(url, pool_size=CONNECTIONS, pool_logging_name="shop")
    with engine.begin() as connection:
        for number in range(TABLES):
            connection.execute(text(f"create table memory_{number} (id int primary key, name varchar(50))"))
            connection.execute(
                text(f"insert into memory_{number} values (:id, :name)"),
                [{"id": i, "name": f"name {i}"} for i in range(200)],
            )
    with engine.connect() as connection:
        read(connection)
        yield engine
    with engine.begin() as connection:
        for number in range(TABLES):
            connection.execute(text(f"drop table memory_{number}"))
    engine.dispose()


def read(connection: Connection) -> None:
    """Read and sort rows of all tables."""
    for number in range(TABLES):
        connection.execute(text(f"select * from memory_{number} where id < :i order by name"), {"i": 100}).all()
    connection.rollback()


def test_of_postgresql(pool_probe: PoolProbe, writer: Writer, postgres: Postgres) -> None:
    """A backend takes between half and twice of what is said."""
    with ten_tables(postgres.url(driver="psycopg")) as engine, ExitStack() as opened:
        sizes = []
        for connection in [opened.enter_context(engine.connect()) for _ in range(CONNECTIONS)]:
            read(connection)
            sizes.append(proportional(connection.execute(text("select pg_backend_pid()")).scalar_one()))
        opened.close()
    assert told(writer) / 2 < mean(sizes) < told(writer) * 2


def test_of_mariadb(pool_probe: PoolProbe, writer: Writer, mariadb: MariaDB) -> None:
    """The server grows by between a third and three times of what is said for each connection."""
    assert mariadb.child is not None
    with ten_tables(mariadb.url(driver="pymysql")) as engine, ExitStack() as opened:
        before = proportional(mariadb.child.pid)
        for connection in [opened.enter_context(engine.connect()) for _ in range(CONNECTIONS)]:
            read(connection)
        grown = (proportional(mariadb.child.pid) - before) / CONNECTIONS
        opened.close()
    assert told(writer) / 3 < grown < told(writer) * 3


def test_of_a_database_without_a_server(pool_probe: PoolProbe, writer: Writer) -> None:
    """SQLite has no connection that costs a server anything, and no series."""
    engine = create_engine("sqlite://", pool_logging_name="shop")
    engine.connect().close()
    with pytest.raises(KeyError):
        told(writer)
