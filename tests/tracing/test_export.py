"""Traces of a real app on a real database, as a collector receives them."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from demo_app.stack.process import free_port, wait_until
from demo_app.stack.servers import Postgres
from fastapi_headroom.tracing import setup
from tests.support.serving import serve
from tests.tracing.receiver import Receiver, Span

pytestmark = pytest.mark.alone

APP = "tests.tracing.app:app"


def tree_of(receiver: Receiver, path: str) -> list[Span]:
    """Return the spans of the one trace whose server span has the route ``path``."""
    found = [t for t in receiver.trees() if any(s.kind == "SERVER" and s.name == f"GET {path}" for s in t)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn-preload"])
def test_one_request_is_one_tree(postgres: Postgres, kind: str) -> None:
    """With OTLP asked for by variables, a request is one server span with its query and its pool wait below it."""
    with Receiver() as receiver:
        env = {
            "TEST_DATABASE_URL": postgres.url(),
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_SERVICE_NAME": "shop",
        }
        with serve(kind, APP, env=env) as server:
            server.get("/read/1")  # opens the connection, so that the wait below is a wait and no connect
            holder = threading.Thread(target=server.get, args=("/hold?seconds=1",))
            holder.start()
            wait_until(lambda: server.get("/checked-out") == "1", 40, "the connection is held")
            assert server.get("/read/4711") == "4711"
            holder.join()
            wait_until(lambda: len([s for s in receiver.spans if s.name == "GET /read/{number}"]) == 2, 40, "two reads")
    (tree,) = [t for t in receiver.trees() if t[0].attributes.get("http.target") == "/read/4711"]
    assert [span.kind for span in tree] == ["SERVER", "INTERNAL", "CLIENT"]
    request, wait, query = tree
    assert (request.name, request.parent, request.service) == ("GET /read/{number}", "", "shop")
    assert (wait.name, wait.parent, query.parent) == ("pool wait", request.id, request.id)
    assert query.name.startswith("SELECT")
    assert wait.attributes.keys() == {"db.client.connection.pool.name"}

    (held,) = [span for span in tree_of(receiver, "/hold") if span.name.startswith("SELECT")]
    assert wait.start < held.end
    assert wait.end == pytest.approx(held.end, abs=0.1)
    assert wait.duration == pytest.approx(held.end - wait.start, abs=0.1)
    assert request.start <= wait.start < wait.end
    assert wait.end - 0.001 <= query.start < query.end <= request.end
    assert not any("4711" in value for key, value in query.attributes.items()), "bound values are in no query span"


def _told(span: Span) -> list[Any]:
    """Return the events of a span that say that its own request held the loop."""
    return [event for event in span.events if event[1].get("by_this_request")]


@pytest.mark.parametrize(("kind", "times"), [("sleep", 1), ("native", 6)])
def test_a_block_of_the_loop_is_an_event_of_the_span(postgres: Postgres, kind: str, times: int) -> None:
    """The span of each request that held the loop tells where, why and how long, though it ends in the step that did.

    Nobody can look while a call keeps the GIL, and other threads may get it next: the request itself tells then.
    """
    with Receiver() as receiver:
        env = {
            "TEST_DATABASE_URL": postgres.url(),
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with serve("uvicorn", APP, env=env) as server:
            server.get("/read/1")  # traces start with the first request
            for _ in range(times):
                server.get(f"/block?kind={kind}")
            wait_until(lambda: sum(s.name == "GET /block" for s in receiver.spans) == times, 10, "the spans")
    for span in (span for span in receiver.spans if span.name == "GET /block"):
        ((name, attributes),) = _told(span)
        assert name == "event_loop.blocked"
        assert str(attributes["site"]).startswith("tests.tracing.app:block:")
        assert attributes["cause"] == "io" if kind == "sleep" else attributes["cause"] in ("native", "python")
        assert 0.1 < float(str(attributes["seconds"])) <= span.duration + 0.05


def test_the_last_spans_are_sent_when_the_app_stops(postgres: Postgres) -> None:
    """Spans that still wait for the next export when the server is stopped reach the collector."""
    with Receiver() as receiver:
        env = {
            "TEST_DATABASE_URL": postgres.url(),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.url}/v1/traces",
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
        }
        with serve("uvicorn", APP, env=env) as server:
            server.get("/read/1")
            assert receiver.spans == []
        assert len(tree_of(receiver, "/read/{number}")) >= 2


def test_a_collector_that_is_down_delays_no_request_and_no_exit(postgres: Postgres) -> None:
    """Without a collector requests are served as fast as ever, and the server stops within seconds."""
    env = {"TEST_DATABASE_URL": postgres.url(), "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with serve("uvicorn", APP, env=env) as server:
        server.get("/read/1")
        started = time.monotonic()
        assert server.get("/read/2") == "2"
        served = time.monotonic()
        server.process.stop()
        assert served - started < 0.5
        assert time.monotonic() - served < setup.FLUSH_TIMEOUT + 2


def test_nothing_is_set_up_when_nothing_asks_for_traces(postgres: Postgres) -> None:
    """Without a provider and without OTEL variables neither SDK nor instrumentation is imported."""
    with serve("uvicorn", APP, env={"TEST_DATABASE_URL": postgres.url()}) as server:
        assert server.get("/read/1") == "1"
        assert json.loads(server.get("/imported")) == {"sdk": False, "instrumentation": False, "active": False}


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "TEST_WITHOUT": "opentelemetry.exporter.otlp"}, "fastapi-headroom[otlp]"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_the_app_serves(
    postgres: Postgres, variables: dict[str, str], line: str
) -> None:
    """A missing exporter or an unsupported protocol is said once, with the remedy, and requests are served."""
    with serve(
        "uvicorn", "tests.tracing.lacking:app", env={"TEST_DATABASE_URL": postgres.url(), **variables}
    ) as server:
        assert [server.get("/read/1"), server.get("/read/2")] == ["1", "2"]
        assert json.loads(server.get("/imported"))["active"] is False
        warnings = [text for text in server.log().splitlines() if "traces are off" in text]
        assert len(warnings) == 1
        assert line in warnings[0]
        assert "Traceback" not in server.log()
