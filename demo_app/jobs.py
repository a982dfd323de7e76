"""The shop's Celery application: mail and reports, each in a queue of its own, both with priorities.

Jobs are acknowledged when they are done and may therefore run twice; each is written so that the second run
changes nothing.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

from celery import Celery
from fastapi.concurrency import run_in_threadpool
from kombu import Queue
from sqlalchemy import Engine, create_engine, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import make_url

from demo_app.faults import strikes
from demo_app.models import Mail, Order, OrderItem, Product, Report
from demo_app.settings import shop_settings

URGENT, NORMAL, BULK = 0, 3, 9
"""Priorities; on Redis the lowest number goes first."""

celery = Celery("shop", broker=shop_settings().broker_url)
celery.conf.update(
    task_queues=[Queue("mail"), Queue("reports")],
    task_routes={"shop.send_mail": {"queue": "mail"}, "shop.build_report": {"queue": "reports"}},
    task_default_queue="mail",
    task_default_priority=NORMAL,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,  # or a worker would hoard low priorities before a high one comes
    broker_transport_options={"priority_steps": [URGENT, NORMAL, 6, BULK], "queue_order_strategy": "priority"},
    broker_connection_retry_on_startup=True,
    broker_pool_limit=4,
)


@lru_cache
def job_engine() -> Engine:
    """Return the engine of the worker processes: a job runs alone there, so one connection is enough."""
    url = make_url(shop_settings().database_url).set(drivername="postgresql+psycopg")
    return create_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True)


class RefusedError(Exception):
    """The mail server takes no mail for this address, now or ever."""


@celery.task(name="shop.send_mail", autoretry_for=(RefusedError,), max_retries=3, default_retry_delay=1)
def send_mail(key: str, recipient_id: int, subject: str) -> bool:
    """Send a mail unless the one with this key was sent before; return whether it was sent now."""
    if strikes("queue_backlog"):
        time.sleep(0.5)
    if recipient_id % 3 == 0 and strikes("poison_task"):
        raise RefusedError(f"recipient {recipient_id}")
    statement = insert(Mail).values(key=key, recipient_id=recipient_id, subject=subject)
    with job_engine().begin() as connection:
        sent = connection.execute(statement.on_conflict_do_nothing(index_elements=["key"]).returning(Mail.id))
        return sent.scalar() is not None


@celery.task(name="shop.build_report")
def build_report(report_id: int) -> None:
    """Sum the turnover of the best-selling products, unless the report is there already."""
    turnover = func.sum(OrderItem.quantity * OrderItem.price_cents)
    query = (
        select(Product.name, turnover)
        .join(OrderItem, OrderItem.product_id == Product.id)
        .group_by(Product.id)
        .order_by(turnover.desc())
        .limit(20)
    )
    with job_engine().begin() as connection:
        pending = select(Report.id).where(Report.id == report_id, Report.result.is_(None)).with_for_update()
        if connection.scalar(pending) is None:
            return
        best = [{"product": name, "cents": cents} for name, cents in connection.execute(query)]
        result = {"orders": connection.scalar(select(func.count()).select_from(Order)), "best": best}
        connection.execute(update(Report).where(Report.id == report_id).values(result=result))


async def publish(task: Any, *arguments: Any, priority: int = NORMAL) -> None:
    """Hand a job to its queue. Celery's client is synchronous, so it runs in the threadpool."""
    await run_in_threadpool(task.apply_async, arguments, priority=priority)
