"""Unsampled requests of measured apps: whose trace context they run in, and that none of it is left to others."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import math
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, ParentBasedTraceIdRatio, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from starlette.testclient import TestClient

from fastapi_headroom.holds import MEMORABLE, steps_of
from fastapi_headroom.ledger import SCOPE_KEY, current
from fastapi_headroom.settings import load
from fastapi_headroom.tracing import gate
from fastapi_headroom.tracing.setup import Tracing
from tests.support.measured import Measured, compute, uvicorn_serving


def traceparent() -> str:
    """Return what a call that is made now would carry, empty if nothing."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


def is_sampled(header: str) -> bool:
    """Return whether the sampled flag is set."""
    return bool(int(header.split("-")[3], 16) & 1)


class Site:
    """Apps that are measured and traced, as ``init`` does it."""

    def __init__(self, measure: Callable[..., Measured], ratio: float, **settings: Any) -> None:
        self._measure = measure
        self._settings = settings
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio))
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(load({}, **settings))

    def put(self, app: Any, *, traced: bool = True) -> Any:
        """Measure an app, and trace it; return what to call."""
        served = self._measure(app, **self._settings).app
        if traced:
            assert self.tracing.start(app)
        return served

    def servers(self) -> int:
        """Return how many server spans there are."""
        return sum(span.kind is SpanKind.SERVER for span in self.exporter.get_finished_spans())


@pytest.fixture
def site(measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    """Makes sites whose provider is the global one."""
    made: list[Site] = []

    def make(ratio: float, **settings: Any) -> Site:
        made.append(Site(measure, ratio, **settings))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", made[-1].provider)
        return made[-1]

    yield make
    for one in made:
        one.tracing.stop()
        one.provider.shutdown()


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that the block leaves the context variables of a request as they were."""

    def seen() -> tuple[Any, ...]:
        return current.get(), otel_context.get_current(), gate._decided.get()

    before = seen()
    yield
    assert seen() == before
    assert all(now is then for now, then in zip(seen(), before, strict=True))


async def get(app: Any, path: str) -> httpx.Response:
    """Call an app in process, in the context of whoever asks."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


def telling() -> FastAPI:
    """Return an app that tells the trace context of each of its parts."""
    app = FastAPI()
    app.state.told = {}

    @app.get("/here")
    async def here() -> str:
        return traceparent()

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> str:
        async def on_loop() -> None:
            await asyncio.sleep(0)
            app.state.told["on loop"] = traceparent()

        tasks.add_task(on_loop)
        tasks.add_task(lambda: app.state.told.update({"in thread": traceparent()}))
        return traceparent()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            for _ in range(3):
                yield traceparent() + "\n"
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    @app.get("/waits")
    async def waits() -> str:
        await asyncio.sleep(0)
        return traceparent()

    @app.get("/fails")
    async def fails() -> None:
        raise ValueError("on purpose")

    @app.get("/sync")
    def sync() -> str:
        return traceparent()

    @app.websocket("/ws")
    async def websocket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(traceparent())
        await socket.receive_text()
        await socket.send_text(traceparent())
        await socket.close()

    return app


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("path", ["/here", "/waits", "/background", "/stream", "/fails", "/sync", "/nowhere", "/off"])
async def test_a_plain_task_that_calls_an_app_keeps_its_context(
    site: Callable[..., Site], path: str, ratio: float
) -> None:
    """Whatever the request does, whoever called the app in its own context finds that as it was."""
    app = site(ratio, excluded_paths=("/off",)).put(telling())
    for _ in range(2):
        with nothing_left():
            await get(app, path)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_a_request_that_calls_another_measured_app_keeps_its_context(
    site: Callable[..., Site], ratio: float
) -> None:
    """An app that is called in process from a request takes part in its trace, and leaves it to the caller."""
    here = site(ratio)
    inner, outer = here.put(telling()), FastAPI()

    @outer.get("/outer")
    async def calls() -> list[str]:
        told = [traceparent()]
        for path in ("/waits", "/stream", "/fails"):
            with nothing_left():
                response = await get(inner, path)
            told += [traceparent(), *([] if path == "/fails" else response.text.strip('"\n').split("\n"))]
        return told

    app = here.put(outer)
    with nothing_left():
        told = (await get(app, "/outer")).json()
    assert len(told) == 8
    assert {one.split("-")[1] for one in told} == {told[0].split("-")[1]}
    assert {is_sampled(one) for one in told} == {bool(ratio)}


async def test_an_app_that_calls_two_others_gets_its_context_back(site: Callable[..., Site]) -> None:
    """Around an unsampled app that is no more than a part of the measured one, nothing is left when it returns."""
    here = site(0.0)
    parts = [telling(), telling()]
    for part in parts:
        here.put(part)
    seen: list[str] = []

    async def dispatcher(scope: Any, receive: Any, send: Any) -> None:
        async def drop(_: Any) -> None:
            """Answer nobody."""

        with nothing_left():
            await parts[0](dict(scope), receive, drop)
        seen.append(traceparent())
        with nothing_left():
            await parts[1](scope, receive, send)
        seen.append(traceparent())

    app = here.put(dispatcher, traced=False)
    with nothing_left():
        response = await get(app, "/waits")
    assert seen == ["", ""]
    assert not is_sampled(response.json())


async def test_a_mounted_app_that_is_measured_too_follows_the_outermost(site: Callable[..., Site]) -> None:
    """Of apps in one another, all given to init, the outermost decides, once: half of the requests at 50 %."""
    here, outer, middle, inner = site(0.5), FastAPI(), FastAPI(), telling()
    outer.mount("/m", middle)
    middle.mount("/i", inner)
    for part in (inner, middle):
        here.put(part)
    served = here.put(outer)
    with nothing_left():
        told = [(await get(served, "/m/i/waits")).json() for _ in range(100)]
    sampled = sum(is_sampled(one) for one in told)
    assert sampled == here.servers()
    assert 15 < sampled < 85, "seven standard deviations"
    assert len({one.split("-")[1] for one in told}) == 100


async def test_an_unsampled_part_that_runs_in_a_task_leaves_no_ledger(site: Callable[..., Site]) -> None:
    """The context that a task of the request was served in is no reason to leave the request's ledger current."""
    here = site(0.0)
    part = telling()
    here.put(part)

    async def in_a_task(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(part(scope, receive, send))

    app = here.put(in_a_task, traced=False)
    with nothing_left():
        assert not is_sampled((await get(app, "/waits")).json())


async def test_a_stack_that_somebody_runs_in_a_task_leaves_no_ledger(site: Callable[..., Site]) -> None:
    """An app whose middleware stack was replaced, so that it runs in another context, leaves nothing either."""
    app = telling()
    served = site(0.0).put(app)
    contexts: list[Any] = []

    class InATask:
        def __init__(self, stack: Any) -> None:
            self.app = stack

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def call() -> None:
                await self.app(scope, receive, send)
                contexts.append(scope[SCOPE_KEY].context)

            await asyncio.create_task(call())

    app.middleware_stack = InATask(app.build_middleware_stack())
    with nothing_left():
        assert not is_sampled((await get(served, "/waits")).json())
    assert contexts != [None], "it was set in the task, and cannot be put back outside"


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_what_a_request_calls_later_carries_its_trace(site: Callable[..., Site], ratio: float) -> None:
    """Background tasks and the parts of a stream carry the context of the request, with its own decision."""
    app = telling()
    served = site(ratio).put(app)
    answered = (await get(served, "/background")).json()
    parts = (await get(served, "/stream")).text.split()
    assert len(app.state.told) == 2
    assert {one.split("-")[1] for one in app.state.told.values()} == {answered.split("-")[1]}
    assert len(parts) == 3
    assert len(set(parts)) == 1
    assert parts[0].split("-")[1] != answered.split("-")[1]
    assert {is_sampled(one) for one in (answered, *app.state.told.values(), *parts)} == {bool(ratio)}


@pytest.mark.parametrize("end", ["cancelled", "closed", "closed elsewhere"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_a_request_that_ends_early_leaves_nothing(site: Callable[..., Site], ratio: float, end: str) -> None:
    """A request that is cancelled, or whose coroutine is thrown away, takes its context with it."""
    app = FastAPI()
    started, cleaned = asyncio.Event(), []

    @app.get("/forever")
    async def forever() -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned.append(traceparent())

    served = site(ratio).put(app)
    scope = {
        "type": "http", "method": "GET", "path": "/forever", "headers": [], "query_string": b"", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "http_version": "1.1", "root_path": "",
    }  # fmt: skip

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Any) -> None:
        """Answer nobody."""

    if end == "cancelled":

        async def calls() -> None:
            with nothing_left():
                try:
                    await served(scope, receive, send)
                except asyncio.CancelledError:
                    pass

        task = asyncio.create_task(calls())
        await started.wait()
        task.cancel()
        await task
    else:
        elsewhere = contextvars.copy_context()
        begun = elsewhere if end == "closed" else contextvars.copy_context()
        coroutine = served(scope, receive, send)
        begun.run(coroutine.send, None)
        mine = object()
        token = elsewhere.run(lambda: current.set(mine))
        assert token.var is current
        elsewhere.run(coroutine.close)
        if end == "closed elsewhere":
            assert elsewhere.run(current.get) is mine
            assert elsewhere.run(otel_context.get_current) == {}
    assert len(cleaned) == 1
    assert current.get() is None
    assert otel_context.get_current() == {}


def test_an_unsampled_websocket_keeps_one_trace(site: Callable[..., Site]) -> None:
    """All that a conversation sends carries the same context, and the next request on the loop has another one."""
    served = site(0.0).put(telling())
    with TestClient(served) as client:
        ids = []
        for _ in range(2):
            with client.websocket_connect("/ws") as socket:
                first = socket.receive_text()
                socket.send_text("on")
                assert socket.receive_text() == first
            ids.append(first)
            ids.append(client.get("/here").json())
    assert len({one.split("-")[1] for one in ids}) == 4
    assert not any(is_sampled(one) for one in ids)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_a_middleware_sees_the_trace_before_and_after(site: Callable[..., Site], ratio: float) -> None:
    """Around ``call_next`` the same span is current, that of the request which the handler is served in."""
    app, seen = telling(), []

    @app.middleware("http")
    async def look(request: Request, call_next: Any) -> Any:
        seen.append(trace.get_current_span())
        response = await call_next(request)
        seen.append(trace.get_current_span())
        return response

    served = site(ratio).put(app)
    told = [(await get(served, path)).text for path in ("/here", "/stream", "/sync")]
    assert len(seen) == 6
    assert all(before is after for before, after in zip(seen[::2], seen[1::2], strict=True))
    for span, text in zip(seen[::2], told, strict=True):
        assert f"{span.get_span_context().trace_id:032x}" in text
        assert span.get_span_context().trace_flags.sampled == bool(ratio)
    assert len(set(seen)) == 3


def test_two_threads_of_a_request_carry_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identifiers of an unsampled request are made when asked for, and only once, whoever asks at one moment."""
    both = threading.Barrier(2, timeout=30)

    class AtOnce(type(gate._RANDOM_IDS)):  # type: ignore[misc]
        def generate_span_id(self) -> int:
            both.wait()
            return super().generate_span_id()  # type: ignore[no-any-return]

    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.0)))
    context = gate.Gate(provider.get_tracer("test"), None, None)._decide({"headers": []})  # type: ignore[arg-type]
    span = trace.get_current_span(context)
    monkeypatch.setattr(gate, "_RANDOM_IDS", AtOnce())
    found: list[trace.SpanContext] = []
    threads = [threading.Thread(target=lambda: found.append(span.get_span_context())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert found[0] is found[1] is span.get_span_context()
    provider.shutdown()


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_nothing_is_left_on_a_connection(site: Callable[..., Site], http: Any) -> None:
    """On one kept-alive connection each request has its caller's trace, or a new one, never that of the one before."""
    served = site(0.0).put(telling())
    told = []
    with uvicorn_serving(served, http=http) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number in range(1, 5):
            headers = {"traceparent": f"00-{number:032x}-{number:016x}-0{number % 2}", "baggage": f"n={number}"}
            for path in ("/background", "/stream", "/sync"):
                client.get(path, headers=headers)
            told.append(client.get("/here", headers=headers).json())
            told.append(client.get("/here").json())
    assert [int(one.split("-")[1], 16) for one in told[::2]] == [1, 2, 3, 4]
    assert [is_sampled(one) for one in told[::2]] == [True, False, True, False]
    assert len({one.split("-")[1] for one in told}) == 8
    assert not any(is_sampled(one) for one in told[1::2])


@pytest.mark.parametrize("ratio", [0.01, 0.3])
def test_the_share_of_sampled_requests_is_the_ratio(ratio: float) -> None:
    """Of 50,000 requests the ratio is sampled, give or take six standard deviations, in forked children too.

    All identifiers are different ones, and none is 0.
    """
    count, children = 10_000, 4
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)))
    decides = gate.Gate(provider.get_tracer("test"), None, None)._decide  # type: ignore[arg-type]

    def draw() -> list[tuple[bool, int]]:
        drawn = []
        for _ in range(count):
            context = decides({"headers": []})
            if context is None:
                drawn.append((True, gate._decided.get() or 0))
            else:
                drawn.append((False, trace.get_current_span(context).get_span_context().trace_id))
        return drawn

    async def on_its_own() -> list[tuple[bool, int]]:
        return draw()  # in a context of its own: the last decision is left in it

    drawn: list[Any] = asyncio.run(on_its_own())
    for _ in range(children):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with os.fdopen(writer, "w") as out:
                    json.dump(draw(), out)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as answer:
            drawn += json.load(answer)
        assert os.waitpid(child, 0)[1] == 0
    total = count * (1 + children)
    ids = {trace_id for _, trace_id in drawn}
    assert len(ids) == len(drawn) == total
    assert 0 not in ids
    assert max(ids) < 1 << 128
    deviation = math.sqrt(total * ratio * (1 - ratio))
    assert abs(sum(sampled for sampled, _ in drawn) - total * ratio) < 6 * deviation
    provider.shutdown()


def test_a_request_that_is_remembered_keeps_nothing_of_its_context(site: Callable[..., Site]) -> None:
    """The steps that held the loop name their request; what the app left in its context is given back all the same."""
    app = FastAPI()
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    large: list[weakref.ref[Any]] = []
    loops: list[asyncio.AbstractEventLoop] = []

    class Large:
        pass

    @app.get("/")
    async def hold() -> None:
        thing = Large()
        large.append(weakref.ref(thing))
        variable.set(thing)
        loops.append(asyncio.get_running_loop())
        compute(2 * MEMORABLE)

    with TestClient(site(0.0).put(app)) as client:
        assert client.get("/").status_code == 200
        (step,) = steps_of(loops[0])
        gc.collect()
        assert large[0]() is None
        assert step.request.route == "/"
