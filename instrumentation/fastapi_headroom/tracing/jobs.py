"""The span of a job's run in a worker, below the request that published the job.

The job carries the request's trace context (W3C ``traceparent`` by default), so a request and the jobs that it
handed over are one tree, however long a job lay in its queue. Names and attributes are those of OpenTelemetry's
messaging conventions. An exception's text is in no span: it may hold a job's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi_headroom.tracing import spans

Lookup = Callable[[str], Any]
"""Gives a field of what the job carries by its name, None where there is none."""


class JobSpan:
    """A run under way; the current span of its thread until it ends."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Any, token: Any) -> None:
        self._span, self._token = span, token

    @property
    def sampled(self) -> tuple[int, int] | None:
        """Trace id and span id, None when the span is not recorded."""
        context = self._span.get_span_context()
        return (context.trace_id, context.span_id) if context.trace_flags.sampled else None

    def end(self, error_type: str = "", end_ns: int | None = None) -> None:
        """End the span, as failed where there is an error type, and make the one before it the current one."""
        from opentelemetry.trace import StatusCode

        try:
            if error_type:
                self._span.set_attribute("error.type", error_type)
                self._span.set_status(StatusCode.ERROR)
            self._span.end(end_ns)
        finally:
            self.leave()

    def leave(self) -> None:
        """Make the span before it the current one, and never end this one: another process tells of the run."""
        from opentelemetry import context

        token, self._token = self._token, None
        if token is not None:
            context.detach(token)


def begin(
    lookup: Lookup, system: str, queue: str, task: str, job: str, *, start_ns: int | None = None
) -> JobSpan | None:
    """Start the span of one run; None while tracing is off.

    It becomes the current span, so that what the job asks of a database is below it. With ``start_ns``
    (nanoseconds since 1970) it is a run of the past, and the current span stays.
    """
    start = spans.starter()
    if start is None:
        return None
    from opentelemetry import context, propagate
    from opentelemetry.trace import SpanKind, set_span_in_context

    # Nothing of this process is above a job but what the job carries.
    parent = propagate.extract(lookup, context.Context(), _GETTER)
    attributes = {
        "messaging.system": system,
        "messaging.destination.name": queue,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": job,
        "headroom.task": task,
    }
    span = start(f"process {queue}", context=parent, kind=SpanKind.CONSUMER, attributes=attributes, start_time=start_ns)
    token = context.attach(set_span_in_context(span, parent)) if start_ns is None else None
    return JobSpan(span, token)


class _Getter:
    """Reads what a job carries as OpenTelemetry's propagators ask for it."""

    def get(self, carrier: Lookup, key: str) -> list[str] | None:
        value = carrier(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Lookup) -> list[str]:
        return []  # no propagator of OpenTelemetry asks for them


_GETTER: Any = _Getter()
