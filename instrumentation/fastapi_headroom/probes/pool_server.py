"""How many connections the database server allows, asked over a connection that the app opens anyhow.

The question is asked once per pool, on the first connection that is opened while measuring: one statement and a
rollback after the connect, where SQLAlchemy itself asks for the server's version and isolation level. No connection
is opened for it, no checkout of an open connection pays for it, and nothing is asked where the setting
``read_database_limit`` is off. See docs/adr/0005-database-limit.md.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from fastapi_headroom.probes.pool import PoolProbe

log = logging.getLogger("fastapi_headroom")

_POSTGRESQL: Final = """\
SELECT least(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true), '0')::int,
    (SELECT CASE WHEN datconnlimit >= 0 THEN datconnlimit END FROM pg_catalog.pg_database
        WHERE datname = current_database()),
    (SELECT CASE WHEN rolconnlimit >= 0 THEN rolconnlimit END FROM pg_catalog.pg_roles WHERE rolname = session_user))"""
_MYSQL: Final = (
    "SELECT CASE WHEN @@max_user_connections > 0 AND @@max_user_connections < @@max_connections "
    "THEN @@max_user_connections ELSE @@max_connections END"
)
STATEMENTS: Final = {"postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL}
"""What is asked, by the dialect's name. MySQL keeps its one reserved connection beyond max_connections."""


class PoolServer:
    """Asks each pool's server once."""

    def __init__(self, probe: PoolProbe) -> None:
        self._probe = probe
        self._asked: WeakKeyDictionary[Any, object] = WeakKeyDictionary()
        """The run of the probe in which a pool's server was asked."""

    def connected(self, dbapi_connection: Any, record: Any) -> None:
        """Ask over a connection that was opened just now, unless its pool was served before. Never raises."""
        probe = self._probe
        try:
            pool = record._ConnectionRecord__pool
            statement = STATEMENTS.get(getattr(pool._dialect, "name", ""))
            if statement is None or not probe.settings.read_database_limit or probe.epoch is None:
                return
            if self._asked.get(pool) is probe.epoch:
                return
            self._asked[pool] = probe.epoch
            limit = _ask(dbapi_connection, statement)
            if limit is not None and limit > 0:
                probe.write_server_limit(pool, limit)
        except Exception as failure:
            probe.guard.failed(failure)


def _ask(dbapi_connection: Any, statement: str) -> float | None:
    """Return the answer, None where the server gives none; the connection is left outside of any transaction.

    A refusal is no failure of ours: poolers and databases that only speak the protocol need not know the words.
    """
    try:
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(statement)
            (limit,) = cursor.fetchone()
        finally:
            cursor.close()
        return float(limit)
    except Exception as refusal:
        log.debug("fastapi-headroom: the database does not tell how many connections it allows (%s)", refusal)
        return None
    finally:
        with contextlib.suppress(Exception):
            dbapi_connection.rollback()
