"""Spans of our own, recorded after the fact with the times that the probes measured.

A probe asks ``spans.active`` (a module attribute, one dictionary look-up) before it does anything for a
trace. Nothing of OpenTelemetry is imported here until ``activate`` was called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

UNSAMPLED: Final = "headroom.unsampled"
"""The key of a scope whose request the gate dropped: who would ask for its trace need not."""
active: bool = False
"""Whether traces are recorded in this process."""
_start_span: Callable[..., Span] | None = None
_current_span: Callable[[], Span] | None = None
_inject: Callable[..., None] | None = None


def activate(provider: TracerProvider) -> None:
    """Record spans with ``provider`` from now on."""
    from importlib.metadata import PackageNotFoundError, version

    from opentelemetry import propagate, trace

    global active, _start_span, _current_span, _inject
    try:
        release = version("fastapi-headroom")
    except PackageNotFoundError:  # run from a source tree that is not installed
        release = "0"
    _start_span = provider.get_tracer("fastapi_headroom", release).start_span
    _current_span = trace.get_current_span
    _inject = propagate.inject
    active = True


def deactivate() -> None:
    """Record nothing from now on."""
    global active, _start_span, _current_span, _inject
    active = False
    _start_span = _current_span = _inject = None


def record(name: str, start_ns: int, end_ns: int, attributes: Mapping[str, str]) -> None:
    """Record a span that lasted from ``start_ns`` to ``end_ns`` (nanoseconds since 1970) below the current one.

    Does nothing when tracing is off, when the current span is not recorded (unsampled), and outside any
    span: a wait that belongs to no request would be a trace of its own.
    """
    if _start_span is None or _current_span is None or not _current_span().is_recording():
        return
    _start_span(name, start_time=start_ns, attributes=attributes).end(end_ns)


def add_event(name: str, at_ns: int, attributes: Mapping[str, str | float | bool]) -> None:
    """Add an event of that moment (nanoseconds since 1970) to the current span, if that is recorded."""
    if _current_span is not None:
        _current_span().add_event(name, attributes, at_ns)


def sampled() -> tuple[int, int] | None:
    """Return trace id and span id of the current span, None when there is none that is sampled."""
    if _current_span is None:
        return None
    context = _current_span().get_span_context()
    return (context.trace_id, context.span_id) if context.trace_flags.sampled else None


def starter() -> Callable[..., Span] | None:
    """Return what starts a span (as a tracer's ``start_span``), None when tracing is off."""
    return _start_span


def inject(carrier: MutableMapping[str, Any]) -> None:
    """Write the current trace context (W3C ``traceparent`` by default) into ``carrier``; nothing when off."""
    if _inject is not None:
        _inject(carrier)
