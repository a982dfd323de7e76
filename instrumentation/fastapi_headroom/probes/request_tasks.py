"""Drives the tasks that a request starts: what they do on the loop is the request's own time.

BaseHTTPMiddleware, ``asyncio.gather`` and task groups run parts of a request in tasks of their own; without this
the code behind one ``@app.middleware("http")`` would not be seen as ``on_loop``.
"""

from __future__ import annotations

import asyncio
import inspect
from asyncio import base_events
from collections.abc import Callable
from types import CoroutineType
from typing import Any

from fastapi_headroom.driver import Driven, DrivenOther
from fastapi_headroom.ledger import current

Factory = Callable[..., Any]
_Task: Any = asyncio.Task
_current = current.get


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


def _driven(coroutine: Any, options: dict[str, Any]) -> Any:
    """Return what a task is to run: the coroutine, driven if it belongs to a request that goes on."""
    context = options.get("context") if options else None
    ledger = current.get() if context is None else context.get(current)
    if ledger is None or ledger.finished:
        return coroutine
    if type(coroutine) is CoroutineType:
        return Driven(coroutine, ledger)
    if asyncio.iscoroutine(coroutine) and not isinstance(coroutine, Driven):
        return DrivenOther(coroutine, ledger)
    return coroutine  # what is no coroutine the task refuses, in its own words


def _factory(make: Factory | None) -> Factory:
    if make is None:
        return _create

    def create(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        return make(loop, _driven(coroutine, options), **options)

    return _eager(make) or create


def _create(loop: asyncio.AbstractEventLoop, coroutine: Any, *, context: Any = None, **options: Any) -> Any:
    """Make a task as a loop without a factory does. Every task of the process passes here."""
    task: Any
    if context is not None or options:  # uvloop hands on that none was given
        options["context"] = context
        task = _Task(_driven(coroutine, options), loop=loop, **options)
    else:
        ledger = _current()
        if ledger is not None and not ledger.finished:
            coroutine = Driven(coroutine, ledger) if type(coroutine) is CoroutineType else _driven(coroutine, options)
        task = _Task(coroutine, loop=loop)
    if stack := task._source_traceback:  # debug mode: where the task was created is the user's line, not ours
        while stack and stack[-1].filename == __file__:
            stack.pop()
        if stack and stack[-1].filename == base_events.__file__:
            stack.pop()
    return task


def _eager(make: Factory) -> Factory | None:
    """Return an eager task factory in place of one, None for any other.

    AnyIO recognises an eager factory by its code and has the constructor within make its tasks, because they must
    not start before it knows them: ours has to be recognised as well.
    """
    eager = getattr(asyncio, "eager_task_factory", None)  # Python 3.12 and later
    if eager is None or getattr(make, "__code__", None) is not eager.__code__:
        return None
    construct = inspect.getclosurevars(make).nonlocals["custom_task_constructor"]

    def constructor(coroutine: Any, **options: Any) -> Any:
        return construct(_driven(coroutine, options), **options)

    factory: Factory = asyncio.create_eager_task_factory(constructor)  # type: ignore[attr-defined]
    return factory
