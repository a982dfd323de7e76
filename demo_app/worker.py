"""What the Celery worker imports (``celery -A demo_app.worker``): the jobs, measured."""

from __future__ import annotations

import fastapi_headroom as headroom
from demo_app.jobs import celery, job_engine

headroom.init_worker(celery, pools={"jobs": job_engine()})
