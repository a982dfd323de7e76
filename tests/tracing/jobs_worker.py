"""Workers, measured and traced: of Celery with ``-A tests.tracing.jobs_worker``, of RQ with ``-m`` and a kind."""

from __future__ import annotations

import os
import sys

import redis
import rq
from celery.signals import worker_process_init

import fastapi_headroom as headroom
from tests.tracing import job_tasks

if __name__ == "__main__":
    headroom.init_worker(exporter=False)
    worker = {"forking": rq.Worker, "simple": rq.SimpleWorker}[sys.argv[1]]
    connection = redis.Redis.from_url(os.environ["TEST_BROKER_URL"])
    worker(["mail-rq"], connection=connection).work(logging_level="WARNING")
else:
    celery = job_tasks.celery
    headroom.init_worker(celery, exporter=False)

    @worker_process_init.connect
    def in_each_child(**_: object) -> None:
        """Instrument as OpenTelemetry's documentation says."""
        job_tasks.instrument()
