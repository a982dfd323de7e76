"""Traces with a provider that the app configured, in one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import Engine, StaticPool, create_engine, event, text
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.routing import Route

from fastapi_headroom.settings import load
from fastapi_headroom.tracing import setup, spans
from fastapi_headroom.tracing.setup import Tracing


class Traces:
    """The user's provider, and what it received."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def finished(self, kind: SpanKind | None = None) -> list[ReadableSpan]:
        """Return the ended spans, of one kind if it is given."""
        return [span for span in self.exporter.get_finished_spans() if kind in (None, span.kind)]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    """A provider as the user's code configures it (the global one can be set only once per process)."""
    made = Traces()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", made.provider)
    yield made
    made.provider.shutdown()


@pytest.fixture
def tracing() -> Iterator[Tracing]:
    """Tracing that is stopped after the test."""
    made = Tracing(load({}))
    yield made
    made.stop()


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine made before tracing starts."""
    made = create_engine("sqlite://", poolclass=StaticPool)
    yield made
    made.dispose()


class Counted:
    """A middleware of the user's that counts how often it is made."""

    made = 0

    def __init__(self, app: Any) -> None:
        self.app = app
        Counted.made += 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def make_app(engine: Engine | None = None, *, own_telemetry: bool = True) -> FastAPI:
    """Return an app with one route; FastAPI's own telemetry reports to a global provider unless switched off."""
    app = FastAPI(telemetry={"tracing": own_telemetry})
    app.add_middleware(Counted)

    @app.get("/items/{number}")
    async def item(number: int) -> int:
        if engine is not None:
            with engine.connect() as connection:
                connection.execute(text("SELECT :number"), {"number": number})
        return number

    return app


async def get(app: Starlette, path: str) -> int:
    """Return the status of one request."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.get(path)).status_code


async def test_a_configured_provider_is_used_and_never_replaced(
    traces: Traces, tracing: Tracing, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans go to the provider that is there, even when variables ask for an export of ours."""
    monkeypatch.setattr(setup, "otlp_requested", lambda: True)
    app = make_app(engine)
    assert tracing.start(app)
    assert await get(app, "/items/7") == 200
    assert trace.get_tracer_provider() is traces.provider
    (server,) = traces.finished(SpanKind.SERVER)
    (query,) = traces.finished(SpanKind.CLIENT)
    assert server.name == "GET /items/{number}"
    assert query.parent is not None
    assert query.parent.span_id == server.context.span_id
    assert len(traces.finished()) == 2


async def test_an_engine_is_not_told_of_its_listeners_and_hears_those_of_the_user(
    traces: Traces, tracing: Tracing, engine: Engine
) -> None:
    """Only connections that are traced look for events; a listener that the user adds later is heard as ever."""
    app = make_app(engine)
    assert tracing.start(app)
    assert await get(app, "/items/7") == 200
    assert not engine._has_events
    assert len(traces.finished(SpanKind.CLIENT)) == 1
    heard = []
    event.listen(engine, "after_cursor_execute", lambda *_: heard.append(1))
    assert await get(app, "/items/7") == 200
    assert heard == [1]
    assert len(traces.finished(SpanKind.CLIENT)) == 2


async def test_a_statement_that_fails_leaves_a_failed_span(traces: Traces, tracing: Tracing, engine: Engine) -> None:
    """The database's error ends the span and is its status."""
    assert tracing.start(make_app(engine))
    with engine.connect() as connection, pytest.raises(OperationalError):
        connection.execute(text("SELECT 1 FROM nowhere"))
    (query,) = traces.finished(SpanKind.CLIENT)
    assert query.status.status_code is StatusCode.ERROR
    assert "nowhere" in (query.status.description or "")


async def test_starting_twice_and_for_several_apps_gives_one_server_span_each(traces: Traces, tracing: Tracing) -> None:
    """Every app is instrumented once, however often start is called."""
    first, second = make_app(), make_app()
    assert tracing.start(first)
    assert tracing.start(first, second)
    assert [await get(app, "/items/7") for app in (first, second)] == [200, 200]
    assert len(traces.finished(SpanKind.SERVER)) == 2


async def test_a_mounted_app_and_a_starlette_app_have_one_server_span(traces: Traces, tracing: Tracing) -> None:
    """A request to a mounted FastAPI app is one server span, and so is one to a plain Starlette app."""
    parent = FastAPI()
    parent.mount("/shop", make_app())
    plain = Starlette(routes=[Route("/items/{number}", lambda request: Response())])
    assert tracing.start(parent, plain)
    assert await get(parent, "/shop/items/7") == 200
    assert len(traces.finished(SpanKind.SERVER)) == 1
    assert await get(plain, "/items/7") == 200
    assert len(traces.finished(SpanKind.SERVER)) == 2


async def test_an_app_of_another_kind_is_served_without_a_server_span(traces: Traces, tracing: Tracing) -> None:
    """A bare ASGI callable has no stack to instrument; starting for it is no error."""

    async def bare(scope: Any, receive: Any, send: Any) -> None: ...

    assert tracing.start(bare)
    assert spans.active


async def test_an_app_that_has_built_its_stack_is_instrumented_too(traces: Traces, tracing: Tracing) -> None:
    """An app that already served gets its server span, and its middlewares are not made a second time."""
    app = make_app(own_telemetry=False)
    assert await get(app, "/items/7") == 200
    built, made = app.middleware_stack, Counted.made
    assert tracing.start(app)
    assert await get(app, "/items/7") == 200
    assert len(traces.finished(SpanKind.SERVER)) == 1
    tracing.stop()
    assert app.middleware_stack is built
    assert Counted.made == made


async def test_stop_puts_everything_back(traces: Traces, tracing: Tracing, engine: Engine) -> None:
    """After stop the app, its engine and BackgroundTask are as before, and no span is made."""
    app = make_app(engine, own_telemetry=False)
    background, attributes = BackgroundTask.__call__, dict(vars(app))
    assert tracing.start(app)
    assert await get(app, "/items/7") == 200
    made = Counted.made
    listeners = len(EngineTracer._remove_event_listener_params)
    tracing.stop()
    traces.exporter.clear()
    assert await get(app, "/items/7") == 200
    spans.record("late", 1, 2, {})
    assert traces.finished() == []
    assert BackgroundTask.__call__ is background
    assert "build_middleware_stack" not in vars(app)
    assert "build_middleware_stack" not in attributes
    assert Counted.made == made
    assert listeners > 0
    assert not engine.dispatch.before_cursor_execute
    assert tracing.start(app)
    assert await get(app, "/items/7") == 200
    assert (len(traces.finished(SpanKind.SERVER)), len(traces.finished(SpanKind.CLIENT))) == (1, 1)


async def test_an_app_and_an_engine_that_the_user_instrumented_are_not_doubled(
    traces: Traces, tracing: Tracing, engine: Engine
) -> None:
    """Where the user has instrumented already there is one server span and one query span."""
    app = make_app(engine)
    FastAPIInstrumentor.instrument_app(app, meter_provider=NoOpMeterProvider())
    meter = NoOpMeterProvider().get_meter("test")
    EngineTracer(traces.provider.get_tracer("user"), engine, meter.create_up_down_counter("connections"))
    try:
        assert tracing.start(app)
        assert await get(app, "/items/7") == 200
        assert len(traces.finished(SpanKind.SERVER)) == 1
        assert len(traces.finished(SpanKind.CLIENT)) == 1
    finally:
        FastAPIInstrumentor.uninstrument_app(app)
        EngineTracer.remove_all_event_listeners()


@pytest.mark.parametrize("module", ["starlette.middleware.opentelemetry", "opentelemetry.instrumentation.asgi"])
async def test_an_app_with_a_tracing_middleware_of_the_user_is_not_doubled(
    traces: Traces, tracing: Tracing, module: str
) -> None:
    """An OpenTelemetryMiddleware that the user added, Starlette's or OpenTelemetry's own, makes the one server span."""
    middleware = pytest.importorskip(module).OpenTelemetryMiddleware
    app = Starlette(routes=[Route("/x/{id}", lambda request: Response("x"))])
    app.add_middleware(middleware, tracer_provider=traces.provider)
    assert tracing.start(app)
    assert await get(app, "/x/1") == 200
    assert len(traces.finished(SpanKind.SERVER)) == 1
    assert {span.instrumentation_scope.name for span in traces.finished()} == {
        module.removesuffix(".middleware.opentelemetry")
    }


async def test_fastapi_telemetry_with_a_provider_of_its_own_is_left_alone(traces: Traces, tracing: Tracing) -> None:
    """An app that the user gave another provider through FastAPI is not instrumented."""
    own = Traces()
    app = FastAPI(telemetry={"tracer_provider": own.provider})

    @app.get("/")
    async def root() -> None: ...

    assert tracing.start(app)
    assert await get(app, "/") == 200
    assert len(own.finished(SpanKind.SERVER)) == 1
    assert traces.finished(SpanKind.SERVER) == []


@pytest.mark.skipif(not hasattr(FastAPI(), "_telemetry"), reason="this FastAPI has no telemetry of its own")
@pytest.mark.parametrize("name", ["operation_spans", "logs", "exclude", "meter_provider"])
async def test_fastapi_telemetry_that_the_user_configured_goes_on(traces: Traces, tracing: Tracing, name: str) -> None:
    """What the user told FastAPI's own telemetry still holds, and a request has exactly one server span, its own."""
    reader = InMemoryMetricReader()
    values = {
        "operation_spans": False,
        "logs": False,
        "exclude": lambda scope: scope["path"] == "/healthz",
        "meter_provider": MeterProvider([reader]),
    }
    app = FastAPI(telemetry={name: values[name]})

    @app.get("/healthz")
    @app.get("/items/{number}")
    async def root() -> None: ...

    assert tracing.start(app)
    assert [await get(app, path) for path in ("/items/7", "/healthz")] == [200, 200]
    servers = traces.finished(SpanKind.SERVER)
    assert {span.instrumentation_scope.name for span in servers if span.instrumentation_scope} == {"fastapi"}
    assert len(servers) == (1 if name == "exclude" else 2)
    if name == "operation_spans":
        assert traces.finished() == servers
    if name == "meter_provider":
        assert "http.server.request.duration" in (reader.get_metrics_data() or MetricsData([])).to_json()


@pytest.mark.skipif(not hasattr(FastAPI(), "_telemetry"), reason="this FastAPI has no telemetry of its own")
async def test_fastapi_telemetry_that_a_setting_keeps_makes_the_server_span(traces: Traces) -> None:
    """keep_fastapi_telemetry leaves an app that nobody configured to FastAPI: one span and no silent metrics."""
    tracing, app = Tracing(load({}, keep_fastapi_telemetry=True)), FastAPI()
    try:
        assert tracing.start(app)
        assert await get(app, "/docs") == 200
    finally:
        tracing.stop()
    (server,) = traces.finished(SpanKind.SERVER)
    assert server.instrumentation_scope is not None
    assert server.instrumentation_scope.name == "fastapi"


@pytest.mark.skipif(not hasattr(FastAPI(), "_telemetry"), reason="this FastAPI has no telemetry of its own")
async def test_metrics_of_an_app_without_fastapis_tracing_go_on(traces: Traces, tracing: Tracing) -> None:
    """Who switched FastAPI's spans off and gave its metrics a provider keeps these; with all off the span is ours."""
    reader = InMemoryMetricReader()
    metered = FastAPI(telemetry={"tracing": False, "meter_provider": MeterProvider([reader])})
    silent = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})
    assert tracing.start(metered, silent)
    assert await get(metered, "/docs") == 200
    assert "http.server.request.duration" in (reader.get_metrics_data() or MetricsData([])).to_json()
    assert traces.finished(SpanKind.SERVER) == []
    assert await get(silent, "/docs") == 200
    assert len(traces.finished(SpanKind.SERVER)) == 1


async def test_excluded_paths_have_no_span(traces: Traces) -> None:
    """Paths that are not measured are not traced either."""
    tracing = Tracing(load({}, excluded_paths=("/items/1", "/items/9*")))
    app = make_app()
    try:
        assert tracing.start(app)
        assert [await get(app, f"/items/{number}") for number in (1, 11, 9, 99)] == [200] * 4
    finally:
        tracing.stop()
    assert [(span.attributes or {})["http.target"] for span in traces.finished(SpanKind.SERVER)] == ["/items/11"]


async def test_a_provider_that_comes_later_is_found_by_the_next_start(
    traces: Traces, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start without a provider changes nothing, and one after the app configured it traces."""
    app = make_app()
    with monkeypatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", None)
        assert not tracing.start(app)
        assert not spans.active
        assert "build_middleware_stack" not in vars(app)
    assert tracing.start(app)
    assert await get(app, "/items/7") == 200
    assert len(traces.finished(SpanKind.SERVER)) == 1


def test_tracing_can_be_switched_off(traces: Traces) -> None:
    """With the setting off a configured provider is not used."""
    assert not Tracing(load({}, tracing=False)).start(make_app())
    assert not spans.active


def test_execution_options_and_dispose_do_not_double_or_lose_query_spans(
    traces: Traces, tracing: Tracing, engine: Engine
) -> None:
    """An engine with options shares its base's spans, and one with a new pool keeps them."""
    assert tracing.start()
    with engine.execution_options(logging_token="reports").connect() as connection:
        connection.execute(text("SELECT 1"))
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    engine.dispose()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert len(traces.finished(SpanKind.CLIENT)) == 3


def test_a_recorded_span_has_the_given_times_and_lies_below_the_current_one(traces: Traces, tracing: Tracing) -> None:
    """``record`` makes a finished child of the current span, and nothing outside a recorded one."""
    assert tracing.start()
    spans.record("nowhere", 5, 6, {})
    with traces.provider.get_tracer("test").start_as_current_span("request") as parent:
        spans.record("pool wait", 1_000, 3_000, {"pool": "primary"})
    recorded, _ = traces.finished()
    assert (recorded.name, recorded.start_time, recorded.end_time) == ("pool wait", 1_000, 3_000)
    assert recorded.attributes == {"pool": "primary"}
    assert recorded.parent is not None
    assert recorded.parent.span_id == parent.get_span_context().span_id


def test_a_failure_while_setting_up_is_logged_once_and_undone(
    traces: Traces, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When the instrumentation breaks, the log says it once, nothing stays patched, and no error is raised."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("another release")

    monkeypatch.setattr(FastAPIInstrumentor, "instrument_app", broken)
    app = make_app()
    assert not tracing.start(app)
    assert not tracing.start(app)
    assert len(caplog.records) == 1
    assert not spans.active
    assert "build_middleware_stack" not in vars(app)


def test_importing_the_module_imports_nothing_of_opentelemetry() -> None:
    """Tracing costs nothing until it is on: neither constructing nor starting it loads OpenTelemetry."""
    code = (
        "import sys\n"
        "from fastapi_headroom.settings import load\n"
        "from fastapi_headroom.tracing.setup import Tracing\n"
        "tracing = Tracing(load({})); started = tracing.start(); tracing.stop()\n"
        "print(started, [name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={}).stdout
    assert printed.strip() == "False []"
