"""Drives the tasks that a request starts: what they do on the loop is the request's own time.

BaseHTTPMiddleware, ``asyncio.gather`` and task groups run parts of a request in tasks of their own; without this
the code behind one ``@app.middleware("http")`` would not be seen as ``on_loop``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi_headroom.driver import Driven
from fastapi_headroom.ledger import current

Factory = Callable[..., Any]


class TaskHook:
    """A task factory chained to the one that the loop has."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._factory: Factory | None = None
        self._previous: Factory | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Put the factory on a loop; off the one it was on."""
        if self._loop is loop and loop.get_task_factory() is self._factory:
            return
        self.detach()
        self._previous = loop.get_task_factory()
        self._loop = loop
        self._factory = _factory(self._previous)
        loop.set_task_factory(self._factory)

    def detach(self) -> None:
        """Put back the factory that was there, unless somebody has set another since."""
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed() and loop.get_task_factory() is self._factory:
            loop.set_task_factory(self._previous)


def _factory(previous: Factory | None) -> Factory:
    make, get = previous, current.get

    def create(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        context = options.get("context") if options else None
        ledger = get() if context is None else context.get(current)
        if ledger is not None and not ledger.finished and type(coroutine) is not Driven:
            coroutine = Driven(coroutine, ledger)
        return asyncio.Task(coroutine, loop=loop, **options) if make is None else make(loop, coroutine, **options)

    return create
