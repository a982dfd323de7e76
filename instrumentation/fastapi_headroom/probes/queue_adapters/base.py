"""The contract of a poller: what the exporter asks of a broker, at any moment, app up or down."""

from __future__ import annotations

from typing import Protocol

from fastapi_headroom.catalog import Metric

Sample = tuple[Metric, tuple[str, ...], float]
"""A row of the catalog, its label values in the row's order, and the value."""


class Poller(Protocol):
    """Reads the state of some queues of one broker."""

    name: str
    """What is polled, for log lines: never holds credentials."""

    def poll(self) -> list[Sample]:
        """Return the samples of now. Raises what the client library raises when the broker cannot be reached,
        within a few seconds; the next call tries to connect anew."""

    def close(self) -> None:
        """Close the connection. Idempotent; a later ``poll`` opens it again."""
