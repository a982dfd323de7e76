"""The queue probe: jobs handed to task libraries and run by their workers, and Starlette's BackgroundTasks.

Depth and age of queues are not measured here but polled by the exporter (``queue_adapters``), so that they are
there when the app is down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.probes.background import BackgroundTaskHooks
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer

_UID = "fastapi-headroom"


class _Hooks(Protocol):
    def bind(self, writer: Writer) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class _Sampled(Protocol):
    """Hooks that have something to write at intervals."""

    def sample(self) -> None: ...


_LIBRARIES: Final = (
    # where it is there once the library has been imported as a whole; module and class of our hooks
    (("celery.app.base", "Celery"), "celery_hooks", "CeleryHooks"),
    (("rq", "Worker", "SimpleWorker"), "rq_hooks", "RQHooks"),
    (("arq", "Worker", "run_worker"), "arq_hooks", "ArqHooks"),
    (("taskiq.receiver", "Receiver"), "taskiq_hooks", "TaskiqHooks"),
    (("taskiq_redis", "RedisAsyncResultBackend"), "taskiq_results", "TaskiqResults"),
    (("dramatiq", "Worker"), "dramatiq_hooks", "DramatiqHooks"),
)


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
        self._hooks: dict[str, _Hooks] = {}
        self._writer: Writer | None = None

    def bind(self, writer: Writer) -> None:
        """Attach to BackgroundTasks, and to the task libraries that the process has imported."""
        self._writer = writer
        self._background.bind(writer)
        for hooks in list(self._hooks.values()):
            hooks.bind(writer)
        self._look_for_libraries()

    def sample(self) -> None:
        """Attach to the libraries that the process imported since; write who consumes."""
        self._look_for_libraries()
        for hooks in list(self._hooks.values()):
            if isinstance(hooks, _Sampled):
                hooks.sample()

    def close(self) -> None:
        """Detach from all of them."""
        self._writer = None
        self._background.close()
        for hooks in list(self._hooks.values()):
            hooks.close()

    def _look_for_libraries(self) -> None:
        # An app that does not use a library must not pay for its import; a module that is just being imported
        # by another thread has no such attribute yet and is found at the next look.
        if (writer := self._writer) is None:
            return
        for (module, *attributes), name, kind in _LIBRARIES:
            if name in self._hooks or not _imported(module, attributes):
                continue
            try:
                adapter = import_module(f"fastapi_headroom.probes.queue_adapters.{name}")
                hooks = self._hooks[name] = getattr(adapter, kind)(self.guard)
                hooks.bind(writer)
            except Exception as error:  # a release that is not as we know it costs its own series, and no other's
                self.guard.failed(error)


def _imported(module: str, attributes: Iterable[str]) -> bool:
    return all(getattr(sys.modules.get(module), name, None) is not None for name in attributes)


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
