"""Traces of publishers and workers in one process, collected in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from fastapi_headroom.tracing import spans


class Traced:
    """What was traced."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> Sequence[ReadableSpan]:
        """Return the ended spans of a name, the first one first."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def assert_runs(self, request: str, attempts: int) -> None:
        """Check that a job's runs hang below a request, each below the one before, and all but the last failed."""
        (above,) = self.named(request)
        runs = self.named("process mail")
        assert len(runs) == attempts
        for run in runs:
            assert run.parent is not None
            assert above.context is not None
            assert (run.parent.trace_id, run.parent.span_id) == (above.context.trace_id, above.context.span_id)
            above = run
        errors = ["error.type" in (run.attributes or {}) for run in runs]
        assert errors == [True] * (attempts - 1) + [False]


@contextlib.contextmanager
def traced() -> Iterator[Traced]:
    """Trace until the end of the block."""
    made = Traced()
    spans.activate(made.provider)
    try:
        yield made
    finally:
        spans.deactivate()
