"""A Dramatiq app for tests, measured as a user does it: ``python -m dramatiq tests.support.dramatiq_app``."""

from __future__ import annotations

import os
import time
from typing import Any

import dramatiq
from dramatiq.broker import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AgeLimit, Retries, ShutdownNotifications, TimeLimit

import fastapi_headroom as headroom
from tests.support import queue_jobs

BROKER = os.environ.get("TEST_BROKER_URL", "redis://127.0.0.1:1/0")


def broker_for(url: str) -> Broker:
    """Return a broker without the middleware that tests do not need, and with the actors below."""
    middleware = [AgeLimit(), TimeLimit(interval=50), ShutdownNotifications(), Retries(min_backoff=10, max_retries=2)]
    made: Broker
    if url.startswith("amqp"):
        made = RabbitmqBroker(url=url.removesuffix("//") + "/%2F", confirm_delivery=True, middleware=middleware)
    else:
        made = RedisBroker(url=url, middleware=middleware)
    dramatiq.set_broker(made)
    return made


broker = broker_for(BROKER)
if os.environ.get("HEADROOM_DIRECTORY"):
    headroom.init_worker(broker, exporter=False)


@dramatiq.actor(queue_name="mail", throws=ValueError)
def kit(folder: str, kind: str) -> None:
    """Do the queue kit's job."""
    queue_jobs.run(folder, kind)


@dramatiq.actor(queue_name="mail", time_limit=200, max_retries=0)
def sleep(seconds: float) -> None:
    """Sleep in small steps: a time limit is an exception between two of them."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


@dramatiq.actor(queue_name="mail", max_age=1)
def old(**_: Any) -> None:
    """Be skipped: it was sent longer ago than a millisecond."""
