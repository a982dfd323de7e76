"""A Celery app for tests: its worker's processes measure themselves into HEADROOM_DIRECTORY."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import redis
from celery import Celery

import fastapi_headroom as headroom
from tests.support import queue_jobs

BROKER = os.environ.get("TEST_BROKER_URL", "redis://127.0.0.1:1/0")
GATE = "gate"
"""Redis list that the task ``hold`` waits on."""


def transport_options(url: str) -> dict[str, Any]:
    """Return the options for a broker: priorities on Redis; on RabbitMQ a publish that waits for its confirmation."""
    if url.startswith("amqp"):
        return {"confirm_publish": True}
    return {"queue_order_strategy": "priority", "priority_steps": [0, 3, 6, 9]}


app = Celery("jobs", broker=BROKER)
app.conf.broker_transport_options = transport_options(BROKER)
app.conf.task_default_queue = "mail"
app.conf.task_ignore_result = True
app.conf.worker_prefetch_multiplier = 1
app.conf.worker_lost_wait = 0.5
app.conf.broker_connection_retry_on_startup = True


@app.task(name="jobs.send")
def send() -> None:
    """Do nothing, successfully."""


@app.task(name="jobs.fail")
def fail() -> None:
    """Fail."""
    raise ValueError("no such address")


@app.task(name="jobs.again", bind=True, max_retries=2)
def again(self: Any) -> None:
    """Ask for two retries, then succeed."""
    if self.request.retries < 2:
        raise self.retry(exc=ConnectionError("busy"), countdown=0)


@app.task(name="jobs.hold", acks_late=True)
def hold() -> None:
    """Run until the gate is opened, and be acknowledged only then."""
    redis.Redis.from_url(BROKER, socket_timeout=30).blpop([GATE], timeout=20)


@app.task(name="jobs.kit", acks_late=True, autoretry_for=(ConnectionError,), default_retry_delay=0)
def kit(folder: str, kind: str) -> None:
    """Do the queue kit's job."""
    queue_jobs.run(folder, kind)


@app.task(name="jobs.last")
def last(seconds: float) -> None:
    """Take so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.02)


@app.task(name="jobs.die")
def die() -> None:
    """End the process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="jobs.leave")
def leave() -> None:
    """Leave the process, as libraries for commands do."""
    sys.exit(3)


if os.environ.get("HEADROOM_DIRECTORY"):
    headroom.init_worker(app, exporter=False)
