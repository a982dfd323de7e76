"""What runs in a worker: the same work for Celery and for RQ."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, text

celery = Celery("orders", broker=os.environ["TEST_BROKER_URL"])
celery.conf.update(
    task_default_queue="mail", task_ignore_result=True, broker_connection_retry_on_startup=True, worker_lost_wait=0.5
)


def look(number: int) -> None:
    """Ask a database once. Raises ValueError for a negative number."""
    with create_engine("sqlite://").connect() as connection:
        connection.execute(text("SELECT :number"), {"number": number})
    if number < 0:
        raise ValueError(f"no order {number}")


@celery.task(name="orders.look")
def look_task(number: int) -> None:
    """Do the work."""
    look(number)


@celery.task(name="orders.again", bind=True, max_retries=1, default_retry_delay=0)
def again_task(self: Any, number: int) -> None:
    """Do the work at the second attempt."""
    if not self.request.retries:
        raise self.retry(exc=ConnectionError("busy"), countdown=0)
    look(number)


@celery.task(name="orders.die")
def die_task(number: int) -> None:
    """End the process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def instrument() -> None:
    """Switch OpenTelemetry's own instrumentation of Celery on, where the test asks for it."""
    if os.environ.get("TEST_INSTRUMENTED"):
        from opentelemetry.instrumentation.celery import CeleryInstrumentor

        CeleryInstrumentor().instrument()
