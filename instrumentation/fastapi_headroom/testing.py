"""Helpers for the tests of apps that use fastapi-headroom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi_headroom.store.writer import Samples, Writer, redirect


class CapturedMetrics:
    """What was written while metrics were captured."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        """The writer in memory, for code that takes one."""

    def value(self, name: str, /, **labels: str) -> float:
        """Return the value of one sample, such as ``headroom_requests_total``. Raises KeyError when there is none."""
        return self.writer.value(name, **labels)

    def samples(self) -> Samples:
        """Return every sample: (sample name, label pairs sorted by name) to value."""
        return self.writer.samples()

    def __contains__(self, name: str) -> bool:
        return any(sample == name for sample, _ in self.samples())


@contextmanager
def capture_metrics(*, max_series: int = 20_000) -> Iterator[CapturedMetrics]:
    """Collect everything that is measured inside the block in memory, without files, slots or a port.

    Works for apps that are initialised inside the block and for those that were before: what is bound to the
    shared files is bound to the captured ones, and back at the end. Blocks do not nest.

        with capture_metrics() as metrics:
            client.get("/orders/7")
            assert metrics.value("headroom_requests_total", http_route="/orders/{order_id}", outcome="ok") == 1
    """
    captured = CapturedMetrics(Writer.in_memory(max_series=max_series))
    redirect(captured.writer)
    try:
        yield captured
    finally:
        redirect(None)
