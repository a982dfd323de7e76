"""The trace context of an RQ job, in a field of its own in the job's hash: the app's ``meta`` stays as it is.

A job takes the context that is current when it is first saved. It keeps it for good, through schedules, retries and
a wait for other jobs: all its runs are below the request that asked for it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from rq.job import Job

from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.tracing import spans

FIELD: Final = "headroom_trace"
_CARRIED: Final = "_headroom_trace"
"""Attribute of a job: the field's text, empty where it has none."""


def attach(patches: Patches, guard: Guard) -> None:
    """Let jobs carry the trace context from now on."""

    def wrap_to_dict(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def to_dict(job: Any, *args: Any, **kwargs: Any) -> Any:
            fields = original(job, *args, **kwargs)
            if spans.active:
                try:
                    if text := _context_of(job):
                        fields[FIELD] = text
                except Exception as error:
                    guard.failed(error)
            return fields

        return to_dict

    def wrap_restore(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def restore(job: Any, raw_data: Any, *args: Any, **kwargs: Any) -> Any:
            restored = original(job, raw_data, *args, **kwargs)
            if spans.active:
                try:
                    text = raw_data.get(FIELD.encode()) or raw_data.get(FIELD) or b""
                    setattr(job, _CARRIED, text.decode() if isinstance(text, bytes) else str(text))
                except Exception as error:
                    guard.failed(error)
            return restored

        return restore

    patches.wrap(Job, "to_dict", wrap_to_dict)
    patches.wrap(Job, "restore", wrap_restore)


def carried(job: Any) -> Mapping[str, Any]:
    """Return what a job carries, by the names of the propagators' fields."""
    try:
        found = json.loads(getattr(job, _CARRIED, "") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _context_of(job: Any) -> str:
    text = getattr(job, _CARRIED, None)
    if text is None:
        carrier: dict[str, str] = {}
        spans.inject(carrier)
        text = json.dumps(carrier) if carrier else ""
        setattr(job, _CARRIED, text)
    return str(text)
