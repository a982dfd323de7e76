"""arq's worker for tests, measured as a user does it: ``python -m arq tests.support.arq_app.WorkerSettings``."""

from __future__ import annotations

import asyncio
import os
from typing import Any, ClassVar

from arq import Retry, func
from arq.connections import RedisSettings

import fastapi_headroom as headroom
from tests.support import queue_jobs

BROKER = os.environ.get("TEST_BROKER_URL", "redis://127.0.0.1:1/0")


async def kit(context: dict[str, Any], folder: str, kind: str) -> None:
    """Do the queue kit's job, in a thread, so that the worker goes on meanwhile."""
    try:
        await asyncio.to_thread(queue_jobs.run, folder, kind)
    except ConnectionError:
        raise Retry from None


async def sleep(context: dict[str, Any], seconds: float) -> None:
    """Sleep."""
    await asyncio.sleep(seconds)


async def later(context: dict[str, Any], seconds: float) -> None:
    """Ask for one retry that is due later."""
    if context["job_try"] == 1:
        raise Retry(defer=seconds)


async def startup(context: dict[str, Any]) -> None:
    """Measure this worker."""
    context["headroom"] = headroom.init_worker(exporter=False)


class WorkerSettings:
    """One job at a time."""

    functions: ClassVar[list[Any]] = [kit, later, func(sleep, timeout=0.2)]
    queue_name = "mail"
    redis_settings = RedisSettings.from_dsn(BROKER)
    on_startup = startup
    max_jobs = 1
    poll_delay = 0.02
    allow_abort_jobs = True
