"""The series that workers and publishers of queues write, and how a test reads them."""

from __future__ import annotations

from fastapi_headroom.store.writer import Writer

WAITS = "headroom_queue_wait_seconds"
RUNS = "messaging_process_duration_seconds"
PUBLISHING = "messaging_client_operation_duration_seconds"
RETRIES = "headroom_queue_retries_total"
MAIL = {"messaging_system": "redis", "messaging_destination_name": "mail"}
PUBLISHED = {**MAIL, "messaging_operation_name": "publish"}


def count(writer: Writer, sample: str, **labels: str) -> float:
    """Return the sum of one sample over all label sets that hold ``labels``."""
    return sum(
        value
        for (name, pairs), value in writer.samples().items()
        if name == sample and labels.items() <= dict(pairs).items()
    )
