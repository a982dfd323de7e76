"""OpenTelemetry's tracer of an engine's statements, without what would be work for nothing."""

from __future__ import annotations

from typing import Any

from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
from opentelemetry.trace import get_current_span

from fastapi_headroom.tracing.gate import UnsampledSpan

_POOL_EVENTS = frozenset({"connect", "close", "checkin", "checkout"})


class StatementTracer(EngineTracer):  # type: ignore[misc, unused-ignore]
    """Traces the statements of one engine.

    A statement of a request that the gate dropped has no span, and needs no attributes for one either. The
    connections in use are counted by the pool probe, so the instrumentation's own count is left out.
    """

    def _before_cur_exec(
        self, conn: Any, cursor: Any, statement: Any, params: Any, context: Any, _executemany: Any
    ) -> Any:
        if type(get_current_span()) is UnsampledSpan:
            return statement, params
        return super()._before_cur_exec(conn, cursor, statement, params, context, _executemany)  # type: ignore[no-untyped-call, unused-ignore]

    @classmethod
    def _register_event_listener(cls, target: Any, identifier: str, func: Any, *args: Any, **kw: Any) -> None:
        if identifier not in _POOL_EVENTS:
            super()._register_event_listener(target, identifier, func, *args, **kw)  # type: ignore[no-untyped-call, unused-ignore]
