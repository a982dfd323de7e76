"""Sampling decided before the instrumentation runs: the same decisions as without, at a fraction of the cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, WebSocket
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.instrumentation import propagators
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    AlwaysRecordSampler,
    Decision,
    ParentBased,
    ParentBasedTraceIdRatio,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import SpanKind
from sqlalchemy import StaticPool, create_engine, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_headroom.settings import load, sdk_counts_spans
from fastapi_headroom.tracing import gate
from fastapi_headroom.tracing.setup import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class ByName(Sampler):
    """A sampler of the user's that looks at more than trace id and parent."""

    def should_sample(
        self,
        parent_context: Any,
        trace_id: int,
        name: str,
        kind: Any = None,
        attributes: Any = None,
        *_: Any,
        **__: Any,
    ) -> SamplingResult:
        wanted = bool(attributes) and "/headers" in str(attributes.get("http.target", ""))
        return SamplingResult(Decision.RECORD_AND_SAMPLE if wanted else Decision.DROP)

    def get_description(self) -> str:
        return "ByName"


class Fixed(RandomIdGenerator):
    """Gives one trace id."""

    def __init__(self, trace_id: int) -> None:
        self.trace_id = trace_id

    def generate_trace_id(self) -> int:
        return self.trace_id


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """Be an ASGI app."""


class Setting:
    """An app that is traced with one sampler, and what came of it."""

    def __init__(self, sampler: Sampler, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.engine = create_engine("sqlite://", poolclass=StaticPool)
        self.app = self.make_app()
        self.tracing = Tracing(load({}, **settings))
        self.instrumented = 0
        self.background: list[trace.SpanContext] = []

    def make_app(self) -> FastAPI:
        """Return an app whose routes tell the trace context that they run in."""
        app = FastAPI()

        @app.get("/headers")
        async def headers() -> dict[str, str]:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            return carrier

        @app.get("/query")
        async def query() -> None:
            with self.engine.connect() as connection:
                connection.execute(text("SELECT 1"))

        @app.get("/fail")
        async def fail() -> None:
            raise ValueError("on purpose")

        @app.get("/background")
        async def background(tasks: BackgroundTasks) -> None:
            tasks.add_task(lambda: self.background.append(trace.get_current_span().get_span_context()))

        @app.websocket("/ws")
        async def websocket(socket: WebSocket) -> None:
            await socket.accept()
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            await socket.send_json(carrier)
            await socket.close()

        return app

    async def get(self, path: str, count: int = 1, **headers: str) -> list[httpx.Response]:
        """Return the responses to some requests, one after the other."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.get(path, headers=headers) for _ in range(count)]

    def servers(self) -> Sequence[ReadableSpan]:
        """Return the server spans."""
        return [span for span in self.exporter.get_finished_spans() if span.kind is SpanKind.SERVER]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a setting whose provider is the global one, and counts the requests that the instrumentation saw."""
    made: list[Setting] = []
    call = OpenTelemetryMiddleware.__call__

    async def counted(self: Any, scope: Any, receive: Any, send: Any) -> None:
        made[-1].instrumented += scope["type"] in ("http", "websocket")
        await call(self, scope, receive, send)

    def one(sampler: Sampler, **settings: Any) -> Setting:
        made.append(Setting(sampler, **settings))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", made[-1].provider)
        assert made[-1].tracing.start(made[-1].app)
        return made[-1]

    monkeypatch.setattr(OpenTelemetryMiddleware, "__call__", counted)
    yield one
    for setting in made:
        setting.tracing.stop()
        setting.provider.shutdown()
        setting.engine.dispose()


def parent(flags: str) -> dict[str, str]:
    """Return the header of a caller whose span has these flags."""
    return {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}


def is_sampled(traceparent: str) -> bool:
    """Return whether the sampled flag is set."""
    return bool(int(traceparent.split("-")[3], 16) & 1)


@pytest.mark.parametrize("sampler", [ParentBasedTraceIdRatio(0.1), TraceIdRatioBased(0.1)])
async def test_the_ratio_is_applied_once(make: Any, sampler: Sampler) -> None:
    """At 10 % about 100 of 1,000 requests have exactly one server span, and the instrumentation saw only those."""
    setting = make(sampler)
    sent = [response.json()["traceparent"] for response in await setting.get("/headers", 1000)]
    spans = setting.servers()
    assert 50 <= len(spans) <= 150, "five standard deviations of the binomial distribution"
    assert max(Counter(span.context.trace_id for span in spans).values()) == 1
    assert setting.instrumented == len(spans)
    sampled = {header.split("-")[1] for header in sent if is_sampled(header)}
    assert sampled == {f"{span.context.trace_id:032x}" for span in spans}
    assert len({header.split("-")[1] for header in sent}) == 1000
    assert all(span.parent is None and span.name == "GET /headers" for span in spans)


async def test_a_sampled_parent_is_followed(make: Any) -> None:
    """A request of a sampled trace always has a server span below its caller's."""
    setting = make(ParentBasedTraceIdRatio(0.0))
    (response,) = await setting.get("/headers", **parent("01"))
    (span,) = setting.servers()
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert response.json()["traceparent"].startswith(f"00-{TRACE}-{span.context.span_id:016x}-")


@pytest.mark.parametrize("sampler", [ParentBasedTraceIdRatio(1.0), ParentBased(ALWAYS_ON)])
async def test_an_unsampled_parent_is_followed(make: Any, sampler: Sampler) -> None:
    """A request of an unsampled trace has no span, and passes on the trace, its state and its baggage."""
    setting = make(sampler)
    headers = {**parent("00"), "tracestate": "vendor=1", "baggage": "plan=gold"}
    (response,) = await setting.get("/headers", **headers)
    sent = response.json()
    version, trace_id, span_id, flags = sent["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE, "00")
    assert int(span_id, 16)
    assert span_id != PARENT
    assert (sent["tracestate"], sent["baggage"]) == ("vendor=1", "plan=gold")
    assert setting.servers() == []
    assert setting.instrumented == 0


@pytest.mark.parametrize("flags", ["00", "01", "02", "03"])
@pytest.mark.parametrize(
    "sampler", [ALWAYS_OFF, ALWAYS_ON, TraceIdRatioBased(0.0), TraceIdRatioBased(1.0), ParentBased(ALWAYS_OFF)]
)
async def test_the_outcome_is_the_same_as_without_the_gate(
    make: Any, monkeypatch: pytest.MonkeyPatch, sampler: Sampler, flags: str
) -> None:
    """With and without a parent, a handler sends on the same trace and flags as when the instrumentation decides."""
    sent = []
    for gated in (True, False):
        if not gated:
            monkeypatch.setattr(gate, "decides_early", lambda _: False)
        setting = make(sampler)
        (alone,), (child,) = await setting.get("/headers"), await setting.get("/headers", **parent(flags))
        headers = [response.json()["traceparent"].split("-") for response in (alone, child)]
        sent.append((headers[0][3], headers[1][1], headers[1][3], len(setting.servers())))
        spans = len(setting.servers())
        assert setting.instrumented == (spans if gated else 2)
    assert sent[0] == sent[1]


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_a_mounted_app_makes_no_span_of_its_own(make: Any, ratio: float) -> None:
    """FastAPI's own telemetry is told to stand aside in apps below this one, sampled or not."""
    setting = make(ParentBasedTraceIdRatio(ratio))
    told: list[Any] = []

    async def tell(request: Request) -> Response:
        told.append(request.scope.get("fastapi.telemetry", "nothing"))
        return Response()

    setting.app = Starlette(routes=[Route("/", tell)])
    assert setting.tracing.start(setting.app)
    await setting.get("/")
    assert told == [None]
    assert len(setting.servers()) == ratio


async def test_a_sampler_of_another_kind_is_asked_by_the_instrumentation(make: Any) -> None:
    """A sampler that looks at attributes gets them: nothing is decided early for it."""
    setting = make(ByName())
    await setting.get("/headers")
    await setting.get("/query")
    assert [span.name for span in setting.servers()] == ["GET /headers"]
    assert setting.instrumented == 2


@pytest.mark.parametrize(
    "sampler",
    [
        AlwaysRecordSampler(ALWAYS_OFF),
        ParentBased(ByName()),
        ParentBased(ALWAYS_OFF, local_parent_not_sampled=ALWAYS_ON),
        type("Mine", (TraceIdRatioBased,), {})(0.0),
    ],
)
async def test_nothing_is_decided_early_where_the_answer_could_differ(make: Any, sampler: Sampler) -> None:
    """Samplers that record without sampling, wrap the user's or revive children go the instrumentation's way."""
    setting = make(sampler)
    await setting.get("/query")
    assert setting.instrumented == 1


async def test_statements_of_unsampled_requests_have_no_span(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements are traced exactly where their request is, and nothing is collected for the others."""
    seen: list[str] = []
    before = EngineTracer._before_cur_exec
    monkeypatch.setattr(EngineTracer, "_before_cur_exec", lambda *args: (seen.append(args[3]), before(*args))[1])
    setting = make(ParentBasedTraceIdRatio(0.0))
    await setting.get("/query")
    assert setting.exporter.get_finished_spans() == ()
    assert seen == []
    assert not setting.engine.pool.dispatch.checkout, "the pool probe counts connections"
    await setting.get("/query", **parent("01"))
    statements = [span for span in setting.exporter.get_finished_spans() if span.kind is SpanKind.CLIENT]
    assert [span.parent.span_id for span in statements] == [setting.servers()[0].context.span_id]


@pytest.mark.parametrize("path", ["/fail", "/background", "/headers", "/nowhere"])
async def test_no_context_is_left_behind(make: Any, path: str) -> None:
    """After a request, also one that failed, the caller's context is as before, and no decision waits."""
    for ratio in (0.0, 1.0):
        setting = make(ParentBasedTraceIdRatio(ratio))
        (response,) = await setting.get(path)
        assert response.status_code == {"/fail": 500, "/nowhere": 404}.get(path, 200)
        assert otel_context.get_current() == {}
        assert gate._decided.get() is None
        assert len(setting.servers()) == ratio


async def test_a_background_task_runs_in_its_requests_trace(make: Any) -> None:
    """A background task of an unsampled request belongs to the same unsampled trace."""
    setting = make(ParentBasedTraceIdRatio(1.0))
    await setting.get("/background", **parent("00"))
    (context,) = setting.background
    assert f"{context.trace_id:032x}" == TRACE
    assert not context.trace_flags.sampled
    assert setting.exporter.get_finished_spans() == ()


async def test_requests_that_run_at_once_keep_their_own_decision(make: Any) -> None:
    """Concurrent requests do not mix up their trace ids."""
    setting = make(ParentBasedTraceIdRatio(0.5))
    responses = [one for many in await asyncio.gather(*(setting.get("/headers", 5) for _ in range(20))) for one in many]
    sampled = {r.json()["traceparent"].split("-")[1] for r in responses if is_sampled(r.json()["traceparent"])}
    assert sampled == {f"{span.context.trace_id:032x}" for span in setting.servers()}
    assert 0 < len(sampled) < 100


def test_websockets_are_decided_early_too(make: Any) -> None:
    """A websocket of an unsampled trace passes on the trace; one of a sampled trace has a server span."""
    setting = make(ParentBasedTraceIdRatio(0.0))
    with TestClient(setting.app) as client:
        with client.websocket_connect("/ws", headers=parent("00")) as socket:
            assert socket.receive_json()["traceparent"].split("-")[1::2] == [TRACE, "00"]
        assert (setting.instrumented, len(setting.servers())) == (0, 0)
        with client.websocket_connect("/ws", headers=parent("01")) as socket:
            assert socket.receive_json()["traceparent"].split("-")[1::2] == [TRACE, "01"]
    assert [f"{span.context.trace_id:032x}" for span in setting.servers()] == [TRACE]


async def test_a_request_in_a_context_goes_the_instrumentations_way(make: Any) -> None:
    """Where a span is current already, the request's is below it, as the instrumentation does it."""
    setting = make(ParentBasedTraceIdRatio(1.0))
    with setting.provider.get_tracer("outer").start_as_current_span("outer") as outer:
        await setting.get("/headers")
    (inner,) = [span for span in setting.exporter.get_finished_spans() if span.name == "GET /headers"]
    assert (inner.kind, inner.parent.span_id) == (SpanKind.INTERNAL, outer.get_span_context().span_id)


async def test_excluded_paths_and_response_propagators_keep_what_they_had(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An excluded path stays outside any trace, and a response propagator writes into unsampled responses too."""
    setting = make(ParentBasedTraceIdRatio(0.0), excluded_paths=("/headers",))
    (response,) = await setting.get("/headers")
    assert response.json() == {}
    monkeypatch.setattr(propagators, "_RESPONSE_PROPAGATOR", propagators.TraceResponsePropagator())
    (response,) = await setting.get("/query")
    assert response.headers["traceresponse"]


async def test_a_gate_that_fails_stays_open(make: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """An error while deciding is said once, and requests are traced without the gate from then on."""
    setting = make(ParentBasedTraceIdRatio(1.0))
    monkeypatch.setattr(gate.Gate, "_decide", lambda *_: 1 / 0)
    assert [response.status_code for response in await setting.get("/headers", 2)] == [200, 200]
    assert len(setting.servers()) == 2
    assert [record.message.split(";")[0] for record in caplog.records if record.name == "fastapi_headroom"] == [
        "fastapi-headroom: sampling cannot be decided early"
    ]


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 1.0])
def test_a_ratio_is_decided_as_the_sampler_itself_does(rate: float) -> None:
    """For any trace id, also those on the edge, the gate and the SDK's sampler say the same."""
    ratio = TraceIdRatioBased(rate)
    edge = ratio.bound
    for trace_id in (1, edge - 1, edge, edge + 1, (5 << 64) + edge, (5 << 64) + max(edge - 1, 0), (1 << 128) - 1):
        provider = TracerProvider(sampler=ParentBased(ratio), id_generator=Fixed(trace_id))
        tracer = provider.get_tracer("test")
        said = ratio.should_sample(None, trace_id, "").decision is Decision.RECORD_AND_SAMPLE
        assert (gate.Gate(tracer, nothing, nothing)._decide({"headers": []}) is None) is said
        assert gate._decided.get() == (trace_id if said else None)
        gate._decided.set(None)
        provider.shutdown()


def test_a_trace_id_is_made_of_what_was_drawn_to_decide() -> None:
    """Of random identifiers half is drawn: it decides as the sampler would, and is the lower half of the trace's id."""
    ratio = TraceIdRatioBased(0.5)
    provider = TracerProvider(sampler=ParentBased(ratio))
    decides = gate.Gate(provider.get_tracer("test"), nothing, nothing)._decide
    ids: dict[bool, set[int]] = {True: set(), False: set()}
    for _ in range(200):
        context = decides({"headers": []})
        sampled = context is None
        if sampled:
            trace_id = gate._decided.get()
        else:
            span = trace.get_current_span(context)
            trace_id = span.get_span_context().trace_id
            assert span.get_span_context() is span.get_span_context()
            assert span.get_span_context().is_valid
        gate._decided.set(None)
        said = ratio.should_sample(None, trace_id, "").decision is Decision.RECORD_AND_SAMPLE
        assert said is sampled
        ids[sampled].add(trace_id)
    assert len(ids[True]) + len(ids[False]) == 200
    assert all(ids.values())
    assert any(trace_id >> 127 for trace_id in ids[False])
    provider.shutdown()


async def test_the_users_provider_is_not_changed(make: Any) -> None:
    """Provider and tracers have the sampler and the id generator that the user gave them."""
    setting = make(sampler := ParentBasedTraceIdRatio(1.0))
    generator = setting.provider.id_generator
    await setting.get("/headers")
    assert (setting.provider.sampler, setting.provider.id_generator) == (sampler, generator)
    assert all(tracer.id_generator is generator for tracer in setting.provider._tracers.values())


def test_spans_that_are_counted_are_not_skipped() -> None:
    """The SDK's own count of spans includes the dropped ones, so asking for it switches the gate off."""
    assert sdk_counts_spans({"OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED": "True"})
    assert not sdk_counts_spans({})
