"""The queue probe: jobs handed to Celery and run by its workers, and Starlette's BackgroundTasks.

Depth and age of queues are not measured here but polled by the exporter (``queue_adapters``), so that they are
there when the app is down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.background import BackgroundTaskHooks
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer

if TYPE_CHECKING:
    from fastapi_headroom.probes.queue_adapters.celery_hooks import CeleryHooks

_UID = "fastapi-headroom"


class QueueProbe:
    """Measures publishing, the wait from enqueue to start, and runs of jobs."""

    name: ClassVar[str] = "queue"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.QUEUE_WAIT,
        catalog.PROCESS_DURATION,
        catalog.PUBLISH_DURATION,
        catalog.QUEUE_RETRIES,
        catalog.BACKGROUND_TASKS,
        catalog.BACKGROUND_TASK_DURATION,
    )

    def __init__(self, settings: Settings) -> None:
        self.guard = Guard(self.name)
        self._background = BackgroundTaskHooks(self.guard)
        self._celery: CeleryHooks | None = None
        self._writer: Writer | None = None

    def bind(self, writer: Writer) -> None:
        """Attach to BackgroundTasks, and to Celery where the process has imported it."""
        self._writer = writer
        self._background.bind(writer)
        if self._celery is not None:
            self._celery.bind(writer)
        self._look_for_celery()

    def sample(self) -> None:
        """Attach to Celery when the process imported it since."""
        self._look_for_celery()

    def close(self) -> None:
        """Detach from both."""
        self._writer = None
        self._background.close()
        if self._celery is not None:
            self._celery.close()

    def _look_for_celery(self) -> None:
        if self._celery is not None or self._writer is None:
            return
        # An app that does not use Celery must not pay for its import; a module that is just being imported
        # by another thread has no such attribute yet and is found at the next look.
        if getattr(sys.modules.get("celery.app.base"), "Celery", None) is None:
            return
        from fastapi_headroom.probes.queue_adapters.celery_hooks import CeleryHooks

        self._celery = CeleryHooks(self.guard)
        self._celery.bind(self._writer)


def install_worker(bind: Callable[[], None], shutdown: Callable[[], None]) -> None:
    """Call ``bind`` in each process that runs a Celery worker's jobs, and ``shutdown`` when it ends.

    That is each child of a prefork pool, and the worker's own process for the solo, threads, gevent and
    eventlet pools. The parent of a prefork pool runs no jobs, so it is left alone. ``bind`` may be called
    twice in one process. Raises ImportError when Celery is not installed.
    """
    from celery import signals

    bound_here = False

    def begin(**_: Any) -> None:
        nonlocal bound_here
        bound_here = True
        bind()

    def ready(sender: Any = None, **_: Any) -> None:
        if type(getattr(sender, "pool", None)).__module__ != "celery.concurrency.prefork":
            begin()

    def end(**_: Any) -> None:
        nonlocal bound_here
        if bound_here:
            bound_here = False
            shutdown()

    for signal, receiver in (
        (signals.worker_process_init, begin),
        (signals.worker_ready, ready),
        (signals.worker_process_shutdown, end),
        (signals.worker_shutdown, end),
    ):
        # The identifier makes a second call replace the first one's receivers instead of doubling them.
        signal.disconnect(dispatch_uid=_UID)
        signal.connect(receiver, weak=False, dispatch_uid=_UID)
