"""Names of connection pools: readable, few, and free of credentials and paths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

MAX_NAMES: Final = 20
"""Pools that get a name of their own; an app that makes an engine per tenant has its further ones summed up."""
_LENGTH: Final = 80


def base_engine(engine: Any) -> Any:
    """Return the synchronous engine that owns the pool, below an AsyncEngine or ``execution_options``."""
    engine = getattr(engine, "sync_engine", engine)
    while "_proxied" in getattr(engine, "__dict__", ()):
        engine = engine._proxied
    return engine


def derive_name(pool: Any, engine: Any = None) -> str:
    """Return the name of a pool that the user did not name.

    ``pool_logging_name`` if it was set, else ``database@host:port`` from the engine's URL (``sqlite:FILE`` for SQLite),
    else the dialect's name. Two engines on the same address share a name and their numbers add up.
    """
    name = getattr(pool, "_orig_logging_name", None)
    if name:
        return str(name)[:_LENGTH]
    if engine is not None:
        return _from_url(engine.url)
    return str(getattr(pool._dialect, "name", "pool"))


def _from_url(url: URL) -> str:
    backend = url.get_backend_name()
    database = url.database or ""
    if backend == "sqlite":
        # the file's name alone: its path may hold a user's name
        path = database.partition("?")[0] if database.startswith("file:") else database  # else "?" is part of a name
        file = re.split(r"[\\/]", path)[-1]
        return f"sqlite:{file or 'memory'}"[:_LENGTH]
    host = url.host or _host_of_query(url)
    port = f":{url.port}" if url.port else ""
    return f"{database or backend}@{host}{port}"[:_LENGTH]


def _host_of_query(url: URL) -> str:
    """Return the host that libpq-style URLs carry as ``?host=``; a socket's directory is ``local``."""
    host = url.query.get("host", "")
    first = host if isinstance(host, str) else host[0]
    return "local" if not first or first.startswith("/") else first.partition(":")[0]
