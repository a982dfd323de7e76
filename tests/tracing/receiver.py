"""A receiver of traces: OTLP over HTTP with protobuf bodies, as a collector would take them."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan


@dataclass(frozen=True)
class Span:
    """One span as it arrived; times are seconds since 1970."""

    name: str
    kind: str
    id: str
    parent: str
    trace: str
    start: float
    end: float
    attributes: dict[str, str]
    service: str
    events: tuple[tuple[str, dict[str, object]], ...] = ()
    """Name and attributes."""

    @property
    def duration(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start


class Receiver(ThreadingHTTPServer):
    """Listens on a free loopback port and keeps every span that is exported to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []

    @property
    def url(self) -> str:
        """The endpoint for OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def trees(self) -> list[list[Span]]:
        """Return the spans of each complete trace (its root has arrived), in the order of their starts."""
        traces: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: span.start):
            traces.setdefault(span.trace, []).append(span)
        return [spans for spans in traces.values() if any(not span.parent for span in spans)]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        """Take one export."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                self.server.spans += [_span(span, service) for span in scope.spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def _span(span: ProtoSpan, service: str) -> Span:
    return Span(
        name=span.name,
        kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        trace=span.trace_id.hex(),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes={a.key: a.value.string_value for a in span.attributes},
        service=service,
        events=tuple((event.name, {a.key: _value(a.value) for a in event.attributes}) for event in span.events),
    )


def _value(value: AnyValue) -> object:
    return getattr(value, value.WhichOneof("value") or "string_value")
