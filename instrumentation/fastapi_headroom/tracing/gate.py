"""Decides whether a request is sampled before OpenTelemetry's instrumentation does anything for it.

The instrumentation collects a request's attributes and wraps its receive and send before the sampler says that
none of it is wanted. So the sampler is asked first, and a request that it drops goes straight to the app, below
an unsampled span that carries the trace on: what the app calls and publishes says "unsampled" too.

Early is done only where the answer is the same as it would be later, which is known of the SDK's own samplers:
they look at nothing but the trace id and the parent. Everything else goes the instrumentation's way.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from random import getrandbits
from typing import Any, cast

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.asgi import asgi_getter, get_host_port_url_tuple
from opentelemetry.instrumentation.propagators import get_global_response_propagator
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from fastapi_headroom.ledger import SCOPE_KEY
from fastapi_headroom.settings import sdk_counts_spans
from fastapi_headroom.tracing.spans import UNSAMPLED

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
log = logging.getLogger("fastapi_headroom")
_response_propagator: Callable[[], Any] = get_global_response_propagator
_url_parts = cast(Callable[[Any], tuple[str, str, str]], get_host_port_url_tuple)
_W3C_FIELDS = frozenset({"traceparent", "tracestate", "baggage"})
"""Propagators of these fields read no other header. Others do: B3's reads one that it does not name."""
_RANDOM: int = getattr(TraceFlags, "RANDOM_TRACE_ID", 0)
_NOBODY: Any = object()
_decided: ContextVar[int | None] = ContextVar("fastapi_headroom_trace_id", default=None)
"""The trace id that was sampled and whose server span is about to be started."""


def _context_variable() -> ContextVar[Context] | None:
    """Return the variable that the current context is kept in; None where another runtime context is configured.

    The public functions are three calls deep each, which costs as much as all else that an unsampled request needs.
    """
    variable = getattr(getattr(otel_context, "_RUNTIME_CONTEXT", None), "_current_context", None)
    return variable if isinstance(variable, ContextVar) else None


_variable = _context_variable()
_current: Callable[[], Context] = otel_context.get_current if _variable is None else _variable.get


class UnsampledSpan(NonRecordingSpan):
    """The span of a request that the gate dropped; every span below it is dropped as well.

    Of a trace that begins here nothing is recorded: its context is made when somebody asks for it. Whoever makes such
    a span sets ``trace_id`` or ``low``, which is cheaper than an ``__init__``.
    """

    trace_id = 0
    """The trace's; 0 while nobody asked for it."""
    low = 0
    """Its lower 64 bits, which were drawn to decide."""
    generator: Any = None
    """Of identifiers; None for random ones."""
    _made: SpanContext | None = None

    def __init__(self, context: SpanContext) -> None:
        # Not the base class's, which sets what is computed here.
        self._made = context

    @property
    def _context(self) -> SpanContext:  # type: ignore[override]
        context = self._made
        if context is None:
            generator = self.generator or _RANDOM_IDS
            trace_id = self.trace_id or getrandbits(64) << 64 | self.low or 1  # 0 is none
            flags = _RANDOM_FLAGS if _RANDOM and generator.is_trace_id_random() else _NO_FLAGS
            made = SpanContext(trace_id, generator.generate_span_id(), False, flags)
            context = vars(self).setdefault("_made", made)  # another thread of the request may have asked meanwhile
        return context


class GatedProvider(trace.TracerProvider):
    """What the instrumentation is given in a provider's place: its server spans get the trace id already decided.

    A ratio that was applied to one trace id must not be applied to a second one, or 1 % became 1 % of 1 %.
    """

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._provider = provider
        self.tracer: Any = None
        """The provider's tracer that was asked for, where its decisions can be made early."""

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        """Return the provider's tracer, wrapped where its decisions can be made early."""
        tracer = self._provider.get_tracer(*args, **kwargs)
        if not decides_early(tracer):
            return tracer
        self.tracer = tracer
        return _GatedTracer(tracer)


class _GatedTracer(trace.Tracer):
    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self.start_as_current_span = tracer.start_as_current_span  # type: ignore[method-assign]

    def start_span(self, name: str, *args: Any, **kwargs: Any) -> trace.Span:
        tracer = self._tracer
        if kwargs.get("kind") is SpanKind.SERVER and (trace_id := _decided.get()) is not None:
            _decided.set(None)
            # A copy per sampled request: the tracer itself is the user's, and its state may change at any time.
            tracer = copy.copy(tracer)
            tracer.id_generator = _Given(trace_id, tracer.id_generator)
        return tracer.start_span(name, *args, **kwargs)  # type: ignore[no-any-return]

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        """Replaced by the tracer's own when made: it must start its spans, not ours."""
        raise NotImplementedError


class _Given:
    """An id generator whose next trace id is known."""

    def __init__(self, trace_id: int, generator: Any) -> None:
        self._trace_id, self._generator = trace_id, generator

    def generate_trace_id(self) -> int:
        return self._trace_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


class Gate:
    """An ASGI callable before an instrumented app: to ``traced`` if it is to be traced, else to ``app``.

    ``of`` is the app whose middleware stack they are. Where it is the one that the request probe measures, nobody's
    code runs between the two, and the probe puts the context back.
    """

    def __init__(self, tracer: Any, traced: ASGIApp, app: ASGIApp, of: Any = _NOBODY) -> None:
        self._tracer, self._untraced, self._of = tracer, app, of
        self.app = traced  # by this name FastAPI's own telemetry looks for the instrumentation, to stand aside
        self._bound: int | None = _root_bound(tracer.sampler)
        self._enabled: Callable[[], bool] = getattr(tracer, "_is_enabled", lambda: True)
        # The instrumentation lies below a ServerErrorMiddleware; its patterns may be those of an OTEL variable.
        excluded: Any = getattr(getattr(traced, "app", None), "excluded_urls", None)
        some = excluded is not None and getattr(excluded, "_excluded_urls", True)
        self._excludes: Callable[[str], bool] | None = excluded.url_disabled if some else None
        self._propagator: Any = None
        self._fields: frozenset[bytes] | None = None
        self._open = False

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Serve one scope. Returns the app's own coroutine, so that no frame of ours is on its stack."""
        if self._open or scope["type"] not in ("http", "websocket"):
            return self.app(scope, receive, send)
        try:
            unsampled = self._decide(scope)
        except Exception:
            self._open = True
            log.exception("fastapi-headroom: sampling cannot be decided early; traces go on without that")
            unsampled = None
        if unsampled is None:
            return self.app(scope, receive, send)
        if "fastapi.telemetry" not in scope:
            scope["fastapi.telemetry"] = None  # FastAPI's own telemetry stands aside, as it does when sampled
        ledger = scope.get(SCOPE_KEY)
        if ledger is None or ledger.app is not self._of or ledger.context is not None or _variable is None:
            scope[UNSAMPLED] = True
            return self._serve(unsampled, scope, receive, send)
        ledger.context = _variable.set(unsampled)
        return self._untraced(scope, receive, send)

    async def _serve(self, unsampled: Context, scope: Any, receive: Any, send: Any) -> None:
        """Serve what is not the measured request itself: an excluded path, a WebSocket, a part of another app's."""
        token = otel_context.attach(unsampled)
        try:
            await self._untraced(scope, receive, send)
        finally:
            otel_context.detach(token)

    def _decide(self, scope: Any) -> Context | None:
        """Return the context to serve an unsampled request in, None for one that goes the instrumentation's way."""
        # A context that is there already has a span, or switches the instrumentation off: not a request like others.
        if _current() or _response_propagator() is not None or not self._enabled():
            return None
        if self._excludes is not None and self._excludes(_url_parts(scope)[2]):
            return None
        context = None
        if (propagator := propagate.get_global_textmap()) is not self._propagator:
            self._look_at(propagator)
        if (named := self._fields) is None:
            context = propagator.extract(scope, getter=asgi_getter)
        else:
            for name, _ in scope["headers"]:
                if name in named:
                    context = propagator.extract(scope, getter=asgi_getter)
                    break
        if context is not None:
            parent = trace.get_current_span(context).get_span_context()
            if parent.is_valid:
                return self._below(parent, context)
        tracer, bound = self._tracer, self._bound
        generator = tracer.id_generator
        span = _new_span(UnsampledSpan)
        if bound is not None and type(generator) is RandomIdGenerator:
            low = span.low = getrandbits(64)
            if low < bound:  # what the sampler would say, for less than its result costs
                _decided.set(getrandbits(64) << 64 | low or 1)
                return None
        else:
            trace_id = span.trace_id = generator.generate_trace_id()
            span.generator = generator
            if bound is None:
                sampled = tracer.sampler.should_sample(_ROOT, trace_id, "", SpanKind.SERVER).decision.is_recording()
            else:
                sampled = trace_id & _LOW_64_BITS < bound
            if sampled:
                _decided.set(trace_id)
                return None
        if context is not None:
            return trace.set_span_in_context(span, context)
        context = _new_context(Context)
        _set_item(context, _SPAN_KEY, span)  # for less than the class's own constructor costs, or allows
        return context

    def _below(self, parent: SpanContext, context: Context) -> Context | None:
        """Decide for a request whose caller is part of a trace."""
        result = self._tracer.sampler.should_sample(context, parent.trace_id, "", SpanKind.SERVER)
        if result.decision.is_recording():
            return None
        span_id = self._tracer.id_generator.generate_span_id()
        flags = TraceFlags(parent.trace_flags & _RANDOM)
        span = UnsampledSpan(SpanContext(parent.trace_id, span_id, False, flags, result.trace_state))
        return trace.set_span_in_context(span, context)

    def _look_at(self, propagator: Any) -> None:
        """Find out which headers a propagator reads, if that is known."""
        fields = propagator.fields
        self._fields = frozenset(field.encode() for field in fields) if fields <= _W3C_FIELDS else None
        self._propagator = propagator


_ROOT = Context()
_RANDOM_IDS = RandomIdGenerator()
_new_span: Callable[[type[UnsampledSpan]], UnsampledSpan] = UnsampledSpan.__new__
_new_context: Callable[[type[Context]], Context] = Context.__new__
_set_item: Callable[[Context, str, Any], None] = dict.__setitem__
(_SPAN_KEY,) = trace.set_span_in_context(trace.INVALID_SPAN, _ROOT)
"""Where a context keeps its span."""
_LOW_64_BITS = (1 << 64) - 1
_NO_FLAGS = TraceFlags(TraceFlags.DEFAULT)
_RANDOM_FLAGS = TraceFlags(_RANDOM)


def is_unsampled() -> bool:
    """Return whether the code that runs belongs to a request that the gate dropped."""
    return type(_current().get(_SPAN_KEY)) is UnsampledSpan


def decides_early(tracer: Any) -> bool:
    """Return whether a tracer is the SDK's own and has a sampler whose decisions can be made early."""
    sdk = sys.modules.get("opentelemetry.sdk.trace")
    if sdk is None or type(tracer) is not sdk.Tracer:
        return False
    return not sdk_counts_spans() and _is_simple(tracer.sampler)  # the spans that are dropped are counted too


def _root_bound(sampler: Any) -> int | None:
    """Return from which trace id on a request without a caller's trace is dropped, None if no ratio decides that."""
    from opentelemetry.sdk.trace import sampling

    root = getattr(sampler, "_root", sampler) if isinstance(sampler, sampling.ParentBased) else sampler
    return root.bound if isinstance(root, sampling.TraceIdRatioBased) else None


def _is_simple(sampler: Any) -> bool:
    """Return whether a sampler looks at trace id and parent only, and drops what is below a dropped span."""
    from opentelemetry.sdk.trace import sampling

    if type(sampler).__module__ != sampling.__name__:
        return False
    if isinstance(sampler, sampling.ParentBased):
        delegates = ("_root", "_remote_parent_sampled", "_remote_parent_not_sampled", "_local_parent_sampled")
        below = getattr(sampler, "_local_parent_not_sampled", None)
        return (
            all(_is_simple(getattr(sampler, name, None)) for name in delegates)
            and isinstance(below, sampling.StaticSampler)
            and below.should_sample(None, 1, "").decision is sampling.Decision.DROP
        )
    return isinstance(sampler, sampling.StaticSampler | sampling.TraceIdRatioBased)
