"""The drivers of SQLAlchemy that the pool probe is tested with."""

from __future__ import annotations

MYSQL = ("asyncmy", "aiomysql", "pymysql")
ASYNC = ("asyncpg", "psycopg-async", "aiosqlite", "asyncmy", "aiomysql")
DRIVERS = (*ASYNC, "psycopg", "psycopg2", "pymysql")
"""psycopg is there twice: it is the same driver for sync and async engines."""


def system_of(driver: str) -> str:
    """Return the value of ``db_system_name``."""
    return "sqlite" if driver == "aiosqlite" else "mysql" if driver in MYSQL else "postgresql"
