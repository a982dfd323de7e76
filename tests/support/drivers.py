"""The drivers of SQLAlchemy that the pool probe is tested with."""

from __future__ import annotations

import asyncpg
from sqlalchemy import exc

MYSQL = ("asyncmy", "aiomysql", "pymysql")
ASYNC = ("asyncpg", "psycopg-async", "aiosqlite", "asyncmy", "aiomysql")
DRIVERS = (*ASYNC, "psycopg", "psycopg2", "pymysql")
"""psycopg is there twice: it is the same driver for sync and async engines."""

KILLED = (exc.DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""What the app gets of a connection that is killed; asyncpg's own while SQLAlchemy still makes it ready."""


def system_of(driver: str) -> str:
    """Return the value of ``db_system_name``."""
    return "sqlite" if driver == "aiosqlite" else "mysql" if driver in MYSQL else "postgresql"
