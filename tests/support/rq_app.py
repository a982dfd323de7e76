"""A worker of RQ for tests, measured as a user does it: ``python -m tests.support.rq_app KIND URL QUEUE``."""

from __future__ import annotations

import sys

import redis
import rq

import fastapi_headroom as headroom

if __name__ == "__main__":
    kind, url, queue = sys.argv[1:]
    headroom.init_worker(exporter=False)
    worker = {"forking": rq.Worker, "simple": rq.SimpleWorker}[kind]
    worker([queue], connection=redis.Redis.from_url(url)).work(logging_level="WARNING")
