"""Spans of SQL statements, by OpenTelemetry's SQLAlchemy instrumentation, for every engine of the process.

The instrumentation finds engines by wrapping ``create_engine`` by name, so it misses those made before and
those made through a name that was imported before; it can be given engines only once; and it refuses
SQLAlchemy 2.1. So each engine gets the instrumentation's tracer when it is first seen at work.

A span's ``db.statement`` is the statement as it is sent, with placeholders: values bound by SQLAlchemy are not
in it, but literals that an app writes into its SQL are. The text of a database's error is the span's status.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from sqlalchemy.engine import Connection, Engine


class EngineTracing:
    """Traces all engines from the first connection that each one gives."""

    def __init__(self, provider: TracerProvider) -> None:
        """Attach. Raises ImportError without SQLAlchemy."""
        from opentelemetry.metrics import NoOpMeterProvider
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        from fastapi_headroom.tracing.statements import StatementTracer

        self._event, self._engine_class, self._tracer_class = event, Engine, cast(Any, StatementTracer)
        self._tracer = provider.get_tracer("opentelemetry.instrumentation.sqlalchemy")
        # The pool probe counts connections; the instrumentation's own count goes nowhere.
        self._usage = NoOpMeterProvider().get_meter("fastapi_headroom").create_up_down_counter("unused")
        self._seen: WeakSet[Engine] = WeakSet()
        self._ours: WeakSet[Engine] = WeakSet()
        self._lock = threading.Lock()
        event.listen(Engine, "engine_connect", self._connected)

    def close(self) -> None:
        """Detach from all engines."""
        if self._event.contains(self._engine_class, "engine_connect", self._connected):
            self._event.remove(self._engine_class, "engine_connect", self._connected)
        for engine in self._ours:
            for entry in self._listeners(engine):
                _, identifier, listener = entry
                if self._event.contains(engine, identifier, listener):
                    self._event.remove(engine, identifier, listener)
                # The instrumentation's own clean-up fails on a listener that is gone.
                self._tracer_class._remove_event_listener_params.remove(entry)
        self._ours.clear()
        self._seen.clear()

    def _connected(self, connection: Connection) -> None:
        engine = connection.engine
        if engine in self._seen:
            return
        with self._lock:
            # `engine.execution_options()` gives a shell around the engine that has the events.
            engine = getattr(engine, "_proxied", engine)
            if engine not in self._seen:
                if not self._listeners(engine):  # else the user has instrumented it
                    self._tracer_class(self._tracer, engine, self._usage)
                    self._ours.add(engine)
                self._seen.add(engine)
            self._seen.add(connection.engine)

    def _listeners(self, engine: Engine) -> list[tuple[Any, str, Any]]:
        """Return what the instrumentation has attached to an engine: reference, event and listener."""
        return [entry for entry in self._tracer_class._remove_event_listener_params if entry[0]() is engine]
