"""Spans of SQL statements, by OpenTelemetry's SQLAlchemy instrumentation, for every engine of the process.

The instrumentation finds engines by wrapping ``create_engine`` by name, so it misses those made before and
those made through a name that was imported before; it can be given engines only once; and it refuses
SQLAlchemy 2.1. So each engine gets the instrumentation's tracer when it is first seen at work on something traced.

An engine with listeners has every connection ask for listeners of seven kinds of event at every statement, which costs
more than all else that an unsampled request does. So the engine is not told that it has listeners: a connection is,
when it first runs a statement of a request that the gate did not drop.

A span's ``db.statement`` is the statement as it is sent, with placeholders: values bound by SQLAlchemy are not
in it, but literals that an app writes into its SQL are. The text of a database's error is the span's status.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from sqlalchemy.engine import Engine

log = logging.getLogger("fastapi_headroom")


class EngineTracing:
    """Traces all engines, each from its first statement that is to be traced."""

    def __init__(self, provider: TracerProvider) -> None:
        """Attach. Raises ImportError without SQLAlchemy."""
        from opentelemetry.metrics import NoOpMeterProvider
        from sqlalchemy import event
        from sqlalchemy.engine import Connection

        from fastapi_headroom.tracing.statements import StatementTracer

        self._event, self._tracer_class = event, cast(Any, StatementTracer)
        self._tracer = provider.get_tracer("opentelemetry.instrumentation.sqlalchemy")
        # The pool probe counts connections; the instrumentation's own count goes nowhere.
        self._usage = NoOpMeterProvider().get_meter("fastapi_headroom").create_up_down_counter("unused")
        self._seen: WeakSet[Engine] = WeakSet()
        self._ours: WeakSet[Engine] = WeakSet()
        self._lock = threading.Lock()
        self._failed = self._closed = False
        self._connection_class = cast(Any, Connection)
        self._original = self._connection_class._execute_context
        self._wrapper = self._connection_class._execute_context = self._wrap_execute(self._original)

    def close(self) -> None:
        """Detach from all engines."""
        self._closed = True
        if self._connection_class._execute_context is self._wrapper:  # else somebody wrapped ours: it stays, inert
            self._connection_class._execute_context = self._original
        for engine in self._ours:
            for entry in self._listeners(engine):
                _, identifier, listener = entry
                if self._event.contains(engine, identifier, listener):
                    self._event.remove(engine, identifier, listener)
                # The instrumentation's own clean-up fails on a listener that is gone.
                self._tracer_class._remove_event_listener_params.remove(entry)
        self._ours.clear()
        self._seen.clear()

    def _wrap_execute(self, original: Any) -> Any:
        """Have the events of a statement that is to be traced heard. All statements pass here."""
        from fastapi_headroom.tracing.gate import is_unsampled

        def _execute_context(connection: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_unsampled() and not (self._closed or self._failed):
                try:
                    self._hear(connection)
                except Exception:
                    self._failed = True
                    log.exception("fastapi-headroom: spans of statements are off; the app is not affected")
            return original(connection, *args, **kwargs)

        return _execute_context

    def _hear(self, connection: Any) -> None:
        engine = connection.engine
        if engine not in self._seen:
            with self._lock:
                # `engine.execution_options()` gives a shell around the engine that has the events.
                engine = getattr(engine, "_proxied", engine)
                if engine not in self._seen:
                    if not self._listeners(engine):  # else the user has instrumented it
                        self._attach(engine)
                    self._seen.add(engine)
                self._seen.add(connection.engine)
            engine = connection.engine
        if not connection._has_events and getattr(engine, "_proxied", engine) in self._ours:
            connection._has_events = True

    def _attach(self, engine: Engine) -> None:
        known = "_has_events" in vars(engine)
        self._tracer_class(self._tracer, engine, self._usage)
        self._ours.add(engine)
        if not known:  # nobody else listens: whoever does so later says it again
            vars(engine).pop("_has_events", None)

    def _listeners(self, engine: Engine) -> list[tuple[Any, str, Any]]:
        """Return what the instrumentation has attached to an engine: reference, event and listener."""
        return [entry for entry in self._tracer_class._remove_event_listener_params if entry[0]() is engine]
