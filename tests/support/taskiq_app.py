"""A TaskIQ app for tests, measured as a user does it: ``python -m taskiq worker tests.support.taskiq_app:broker``."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

from taskiq import AsyncBroker, Context, SimpleRetryMiddleware, TaskiqDepends
from taskiq_aio_pika import AioPikaBroker, Queue
from taskiq_redis import ListQueueBroker, RedisStreamBroker

import fastapi_headroom as headroom
from tests.support import queue_jobs


def broker_for(kind: str, url: str) -> AsyncBroker:
    """Return a broker of a kind: ``list``, ``stream`` or ``amqp``."""
    made: AsyncBroker
    if kind == "amqp":
        made = AioPikaBroker(url.removesuffix("//") + "/", qos=1, task_queues=[Queue(name="mail")])
    elif kind == "stream":
        made = RedisStreamBroker(url, queue_name="mail", consumer_id="0", xread_count=1, xread_block=100,
                                 unacknowledged_lock_timeout=1.0)  # fmt: skip
    else:
        # redis-py 8 gives a read five seconds: taskiq-redis 1.2 takes a wait that long for a failure, and restarts.
        made = ListQueueBroker(url, queue_name="mail", socket_timeout=None)
    made.add_middlewares(SimpleRetryMiddleware(default_retry_label=True, types_of_exceptions=[ConnectionError]))
    return made


broker = broker_for(
    os.environ.get("TEST_BROKER_KIND", "list"), os.environ.get("TEST_BROKER_URL", "redis://127.0.0.1:1/0")
)
if os.environ.get("HEADROOM_DIRECTORY"):
    headroom.init_worker(broker, exporter=False)


@broker.task("kit")
async def kit(folder: str, kind: str) -> None:
    """Do the queue kit's job, in a thread."""
    await asyncio.to_thread(queue_jobs.run, folder, kind)


@broker.task("kit_sync")
def kit_sync(folder: str, kind: str) -> None:
    """Do the queue kit's job as a function that is no coroutine."""
    queue_jobs.run(folder, kind)


@broker.task("sleep", timeout=0.2)
async def sleep(seconds: float) -> None:
    """Sleep."""
    await asyncio.sleep(seconds)


@broker.task("once_more")
async def once_more(context: Annotated[Context, TaskiqDepends()]) -> None:
    """Ask to be put back once."""
    if "X-Taskiq-requeue" not in context.message.labels:
        await context.requeue()
