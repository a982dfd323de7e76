"""Times as libraries write them into jobs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

READY_AT: Final = "headroom_ready_at"
"""Where jobs keep since when they can be run, in seconds since 1970; our publisher hooks write it."""


def parse_time(text: str) -> float | None:
    """Return an ISO 8601 time as seconds since 1970 (UTC where it names no zone), None when it is no time."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
