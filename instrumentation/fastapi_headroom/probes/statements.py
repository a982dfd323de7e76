"""SQL statements: how long they take, how many a request runs, and when a held connection works at all.

SQLAlchemy's cursor events would serve, but an engine with any listener takes a slower path through several more of
them, and nothing is fired when a hook before ours raises; a wrap with ``finally`` closes the ledger's wait always.
"""

from __future__ import annotations

import re
from time import perf_counter
from typing import Any, Final

from fastapi_headroom import catalog, ledger
from fastapi_headroom.ledger import DB, Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pool_series import HOLD_KEY
from fastapi_headroom.probes.repeats import LAST, Repeats
from fastapi_headroom.store.writer import Histogram, Writer
from fastapi_headroom.thresholds import REPEATED_STATEMENTS

OPERATIONS: Final = frozenset({
    "SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "VALUES", "CALL", "EXECUTE", "COPY",
    "BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET", "SHOW", "EXPLAIN", "PRAGMA", "LOCK",
    "CREATE", "ALTER", "DROP", "TRUNCATE", "VACUUM", "ANALYZE", "REFRESH", "GRANT", "REVOKE", "LISTEN", "NOTIFY",
})  # fmt: skip
"""The values of ``db_operation_name``; any other statement is OTHER."""
UNKNOWN: Final = 1 << 62
"""Rows from which on a number is none: MySQL's drivers say 2**64 - 1 of a result that they have not read."""
MAX_ERROR_TYPES: Final = 30
MAX_TEXTS: Final = 1_000
"""Texts of statements per database system whose series is remembered; SQLAlchemy keeps 500 by default."""
MAX_TEXT: Final = 10_000
"""Characters of the longest such text."""
_SYSTEMS: Final = {"mssql": "microsoft.sql_server", "oracle": "oracle.db"}
_FIRST_WORD: Final = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*([A-Za-z]+)", re.DOTALL)


def operation_name(sql: str) -> str:
    """Return the statement's first keyword, past comments and parentheses: one of OPERATIONS, else OTHER.

    ``WITH`` counts as SELECT, which it nearly always is.
    """
    match = _FIRST_WORD.match(sql)
    word = match[1].upper() if match else ""
    if word == "WITH":
        return "SELECT"
    return word if word in OPERATIONS else "OTHER"


class Statements:
    """Times statements. ``writer`` is None while the probe is not bound; the hooks do nothing then."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.writer: Writer | None = None
        self.repeats = Repeats(guard)
        self._by_text: dict[str, dict[str, Histogram]] = {}
        """By database system and text: the same text comes again and again, and its hash is known."""
        self._bounded = BoundedNames(MAX_ERROR_TYPES)

    def bind(self, writer: Writer | None) -> None:
        """Write to ``writer`` from now on, or nowhere."""
        self._by_text = {}
        self._bounded = BoundedNames(MAX_ERROR_TYPES)
        self.repeats.bind(writer)
        self.writer = writer

    def attach(self, patches: Patches) -> None:
        """Wrap the places where SQLAlchemy runs statements. Raises AttributeError when they are not there."""
        from sqlalchemy.engine.base import Connection
        from sqlalchemy.engine.default import DefaultDialect

        patches.wrap(Connection, "_exec_single_context", lambda original: self._wrap_context(original, tells=True))
        patches.wrap(Connection, "_exec_insertmany_context", lambda original: self._wrap_context(original, tells=False))
        patches.wrap(Connection, "_cursor_execute", self._wrap_cursor)
        patches.wrap(Connection, "_commit_impl", lambda original: self._wrap_transaction(original, "COMMIT"))
        patches.wrap(Connection, "_rollback_impl", lambda original: self._wrap_transaction(original, "ROLLBACK"))
        patches.wrap(DefaultDialect, "_do_ping_w_event", self._wrap_ping)

    def _wrap_context(self, original: Any, *, tells: bool) -> Any:
        """Time a statement. ``tells`` is whether its cursor's ``rowcount`` is the number of rows that it gave back."""
        current, now, finish, repeated = ledger.current.get, perf_counter, self._finish, self.repeats.note
        guard = self.guard
        many, last = REPEATED_STATEMENTS, LAST

        def execute(connection: Any, dialect: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
            # without autobegin it is the dialect's own look around on a new connection: part of creating it
            if self.writer is None or not connection._allow_autobegin:
                return original(connection, dialect, context, *args, **kwargs)
            request = current()
            if request is not None:
                request.queries += 1
                request.enter(DB)
            error = ""
            started = now()
            try:
                result = original(connection, dialect, context, *args, **kwargs)
                if tells and request is not None:
                    try:
                        rows = context.cursor.rowcount if result._metadata.returns_rows else -1
                        if 0 <= rows < UNKNOWN:
                            request.rows = rows if request.rows < 0 else request.rows + rows
                    except Exception as failure:
                        guard.failed(failure)
                return result
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                text = context.statement or ""
                finish(connection, text, now() - started, error, request)
                if request is not None:
                    ran = request.queries  # by now: others may have run at the same time
                    if ran < many:
                        request.texts = (text, request.texts)
                    elif ran <= last:
                        repeated(request, text, dialect)

        return execute

    def _wrap_cursor(self, original: Any) -> Any:
        current, now, finish, repeated = ledger.current.get, perf_counter, self._finish, self.repeats.note
        many, last = REPEATED_STATEMENTS, LAST

        def execute(connection: Any, cursor: Any, statement: str, *args: Any, **kwargs: Any) -> Any:
            if self.writer is None or not connection._allow_autobegin:
                return original(connection, cursor, statement, *args, **kwargs)
            request = current()
            if request is not None:
                request.queries += 1
                request.enter(DB)
            error = ""
            started = now()
            try:
                return original(connection, cursor, statement, *args, **kwargs)
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                finish(connection, statement, now() - started, error, request)
                if request is not None:
                    ran = request.queries  # by now: others may have run at the same time
                    if ran < many:
                        request.texts = (statement, request.texts)
                    elif ran <= last:
                        repeated(request, statement, connection.dialect)

        return execute

    def _wrap_transaction(self, original: Any, operation: str) -> Any:
        current, now, finish = ledger.current.get, perf_counter, self._finish

        def end(connection: Any) -> None:
            if self.writer is None:
                original(connection)
                return
            request = current()
            if request is not None:
                request.enter(DB)
            error = ""
            started = now()
            try:
                original(connection)
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                finish(connection, operation, now() - started, error, request)

        return end

    def _wrap_ping(self, original: Any) -> Any:
        def ping(dialect: Any, *args: Any, **kwargs: Any) -> Any:
            request = None if self.writer is None else ledger.current.get()
            if request is None:
                return original(dialect, *args, **kwargs)
            request.enter(DB)
            try:
                return original(dialect, *args, **kwargs)
            finally:
                request.leave(DB)

        return ping

    def _finish(self, connection: Any, text: str, elapsed: float, error: str, request: Ledger | None) -> None:
        """End the wait of a statement and record it."""
        if request is not None:
            request.leave(DB)
        try:
            fairy = connection._dbapi_connection
            record = None if fairy is None else fairy._connection_record
            if record is not None:
                hold = record.record_info.get(HOLD_KEY)
                if hold is not None:
                    hold.busy += elapsed
            system = connection.dialect.name
            if error:
                self._histogram(system, operation_name(text), error).observe(elapsed)
                return
            try:
                handle = self._by_text[system][text]
            except KeyError:
                handle = self._remember(system, text)
            handle.observe(elapsed)
        except Exception as failure:
            self.guard.failed(failure)

    def _remember(self, system: str, text: str) -> Histogram:
        """Return the series of a statement whose text is not known, and know it from now on."""
        handle = self._histogram(system, operation_name(text), "")
        by_text = self._by_text.setdefault(system, {})
        if len(by_text) < MAX_TEXTS and len(text) <= MAX_TEXT:
            by_text[text] = handle
        return handle

    def _histogram(self, system: str, operation: str, error: str) -> Histogram:
        assert self.writer is not None
        error = self._bounded(error) if error else ""
        return self.writer.histogram(catalog.DB_OPERATION_DURATION, _SYSTEMS.get(system, system), operation, error)
