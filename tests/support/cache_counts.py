"""What the tests of the cache probe read off a writer."""

from __future__ import annotations

from fastapi_headroom.store.writer import Writer

REQUESTS = "headroom_cache_requests_total"
DURATIONS = "headroom_cache_operation_duration_seconds_count"


def results(writer: Writer, cache: str = "main") -> dict[tuple[str, str], float]:
    """Return the look-ups that were counted: (key pattern, result) -> number, without zeros."""
    found = {}
    for (name, labels), number in writer.samples().items():
        by_name = dict(labels)
        if name == REQUESTS and by_name["cache"] == cache and number:
            found[by_name["key_pattern"], by_name["result"]] = number
    return found


def operations(writer: Writer, cache: str = "main") -> dict[str, float]:
    """Return how often each operation was timed."""
    return {
        dict(labels)["operation"]: number
        for (name, labels), number in writer.samples().items()
        if name == DURATIONS and dict(labels)["cache"] == cache
    }


def value(writer: Writer, name: str, /, **labels: str) -> float:
    """Return the value of one sample, 0 where there is none."""
    return writer.samples().get((name, tuple(sorted(labels.items()))), 0.0)
