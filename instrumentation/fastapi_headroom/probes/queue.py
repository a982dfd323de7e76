"""The queue probe: jobs handed to Celery and RQ and run by their workers, and Starlette's BackgroundTasks.

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
    from fastapi_headroom.probes.queue_adapters.rq_hooks import RQHooks

_UID = "fastapi-headroom"


class QueueProbe:
    """Measures publishing, the wait from enqueue to start, and runs of jobs."""

    name: ClassVar[str] = "queue"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.QUEUE_WAIT,
        catalog.PROCESS_DURATION,
        catalog.PUBLISH_DURATION,
        catalog.QUEUE_RETRIES,
        catalog.QUEUE_CONSUMERS,
        catalog.BACKGROUND_TASKS,
        catalog.BACKGROUND_TASK_DURATION,
        catalog.BACKGROUND_TASK_WAIT,
        catalog.BACKGROUND_TASK_FAILURES,
    )

    def __init__(self, settings: Settings) -> None:
        self.guard = Guard(self.name)
        self._background = BackgroundTaskHooks(self.guard)
        self._celery: CeleryHooks | None = None
        self._rq: RQHooks | None = None
        self._writer: Writer | None = None

    def bind(self, writer: Writer) -> None:
        """Attach to BackgroundTasks, and to Celery and RQ where the process has imported them."""
        self._writer = writer
        self._background.bind(writer)
        for hooks in (self._celery, self._rq):
            if hooks is not None:
                hooks.bind(writer)
        self._look_for_libraries()

    def sample(self) -> None:
        """Attach to Celery and RQ when the process imported them since; write who consumes."""
        self._look_for_libraries()
        if self._celery is not None:
            self._celery.sample()

    def close(self) -> None:
        """Detach from all of them."""
        self._writer = None
        self._background.close()
        for hooks in (self._celery, self._rq):
            if hooks is not None:
                hooks.close()

    def _look_for_libraries(self) -> None:
        # An app that does not use a library must not pay for its import; a module that is just being imported
        # by another thread has no such attribute yet and is found at the next look.
        if (writer := self._writer) is None:
            return
        if self._celery is None and _imported("celery.app.base", "Celery"):
            from fastapi_headroom.probes.queue_adapters.celery_hooks import CeleryHooks

            self._celery = CeleryHooks(self.guard)
            self._celery.bind(writer)
        if self._rq is None and _imported("rq", "Worker") and _imported("rq", "SimpleWorker"):
            from fastapi_headroom.probes.queue_adapters.rq_hooks import RQHooks

            self._rq = RQHooks(self.guard)
            self._rq.bind(writer)


def _imported(module: str, attribute: str) -> bool:
    return getattr(sys.modules.get(module), attribute, None) is not None


def install_worker(bind: Callable[[], None], shutdown: Callable[[], None]) -> None:
    """Call ``bind`` in each process of a Celery worker, and ``shutdown`` when it ends.

    That is the main process once it takes jobs, and each child of a prefork pool. ``bind`` may be called twice in
    one process. Raises ImportError when Celery is not installed.
    """
    from celery import signals

    from fastapi_headroom.probes.queue_adapters import celery_worker

    bound_here = False

    def begin(**_: Any) -> None:
        nonlocal bound_here
        bound_here = True
        bind()

    def ready(sender: Any = None, **_: Any) -> None:
        celery_worker.serve(sender)
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
