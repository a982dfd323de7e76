"""An app that hands jobs to Celery and to RQ."""

from __future__ import annotations

import os

import redis
import rq
from fastapi import FastAPI

import fastapi_headroom as headroom
from tests.tracing import job_tasks

app = FastAPI()
queue = rq.Queue("mail-rq", connection=redis.Redis.from_url(os.environ["TEST_BROKER_URL"]))


@app.get("/celery/{task}")
def to_celery(task: str, number: int) -> str:
    """Send a task; return its id."""
    return str(job_tasks.celery.send_task(f"orders.{task}", (number,)).id)


@app.get("/rq/look")
def to_rq(number: int) -> str:
    """Enqueue a job; return its id."""
    return str(queue.enqueue(job_tasks.look, number).id)


job_tasks.instrument()
headroom.init(app)
