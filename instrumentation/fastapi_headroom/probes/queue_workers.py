"""Where the worker processes of a task library begin and end: what ``init_worker(app)`` attaches to.

An app imports the same module as its workers do, to publish; so nothing begins before the library says that
this process is a worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.queue import install_worker as install_celery

Install = Callable[[Any, Callable[[], None], Callable[[], None]], None]
_MARK: Final = "_headroom_worker"


def install(app: Any, bind: Callable[[], None], shutdown: Callable[[], None]) -> None:
    """Call ``bind`` in each process that runs jobs of ``app``, and ``shutdown`` when it ends.

    ``app`` is a Celery application, a Dramatiq or a TaskIQ broker. A second call for it replaces the first one's.
    Raises SettingsError when it is none of these.
    """
    if _is(app, "dramatiq.broker", "Broker"):
        _install_dramatiq(app, bind, shutdown)
    elif _is(app, "taskiq.abc.broker", "AsyncBroker"):
        _install_taskiq(app, bind, shutdown)
    elif _is(app, "celery", "Celery"):
        install_celery(bind, shutdown)
    else:
        raise SettingsError(
            f"init_worker() takes a Celery app, or a Dramatiq or TaskIQ broker, got {type(app).__name__}: "
            "in a worker of RQ or arq call it without one"
        )


def _is(app: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(app, kind)


def _install_dramatiq(broker: Any, bind: Callable[[], None], shutdown: Callable[[], None]) -> None:
    from dramatiq.middleware import Middleware

    for known in broker.middleware:
        if hasattr(known, _MARK):
            known.bind, known.shutdown = bind, shutdown
            return

    class HeadroomWorker(Middleware):
        """Measures a worker's process."""

        def __init__(self) -> None:
            self.bind, self.shutdown = bind, shutdown
            setattr(self, _MARK, True)

        def before_worker_boot(self, broker: Any, worker: Any) -> None:
            self.bind()

        def after_worker_shutdown(self, broker: Any, worker: Any) -> None:
            self.shutdown()

    broker.add_middleware(HeadroomWorker())


def _install_taskiq(broker: Any, bind: Callable[[], None], shutdown: Callable[[], None]) -> None:
    from taskiq.events import TaskiqEvents

    def begin(_: Any) -> None:
        bind()

    def end(_: Any) -> None:
        shutdown()

    for event, handler in ((TaskiqEvents.WORKER_STARTUP, begin), (TaskiqEvents.WORKER_SHUTDOWN, end)):
        setattr(handler, _MARK, True)
        handlers = broker.event_handlers[event]
        handlers[:] = [known for known in handlers if not hasattr(known, _MARK)]
        handlers.append(handler)
