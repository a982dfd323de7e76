"""The drivers of SQLAlchemy that the pool probe is tested with."""

from __future__ import annotations

import asyncio

import asyncpg
from sqlalchemy import exc

from demo_app.stack.servers import Postgres

MYSQL = ("asyncmy", "aiomysql", "pymysql")
ASYNC = ("asyncpg", "psycopg-async", "aiosqlite", "asyncmy", "aiomysql")
DRIVERS = (*ASYNC, "psycopg", "psycopg2", "pymysql")
"""psycopg is there twice: it is the same driver for sync and async engines."""

KILLED = (exc.DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What the app gets of a connection that is killed; asyncpg's own while SQLAlchemy still makes it ready.

asyncpg calls it an internal error between the server's last message and the end of the connection.
"""


async def kill(postgres: Postgres, pid: int, connection: asyncpg.Connection | None = None) -> None:
    """Let the server end a connection, and wait until it has; and until a connection of asyncpg knows it, too."""
    async with asyncio.timeout(30):
        other = await asyncpg.connect(postgres.dsn)
        await other.execute("select pg_terminate_backend($1)", pid)
        while await other.fetchval("select count(*) from pg_stat_activity where pid = $1", pid):
            await asyncio.sleep(0.01)
        await other.close()
        while connection is not None and not connection.is_closed():
            await asyncio.sleep(0.001)


def system_of(driver: str) -> str:
    """Return the value of ``db_system_name``."""
    return "sqlite" if driver == "aiosqlite" else "mysql" if driver in MYSQL else "postgresql"
