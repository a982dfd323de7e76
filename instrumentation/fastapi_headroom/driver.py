"""The step driver: runs a coroutine step by step and charges each step to the ledger as ``on_loop``.

A step is what happens between two suspensions: one ``send`` or ``throw``. The driver is an object with these
methods and no generator: an exception that is thrown in goes straight to the coroutine and what comes out goes
straight to the caller, so cancellation, ``sys.exc_info()`` and tracebacks are those of the bare coroutine.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from time import perf_counter
from typing import Any

from fastapi_headroom.ledger import ON_LOOP, Ledger


class Driven(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are timed. It can be awaited once, or given to a task.

    A step within a step of the same request (an eagerly started task) belongs to the outer one, and steps
    after the request has finished (background tasks) do not count.
    """

    __slots__ = ("__weakref__", "_coroutine", "_ledger", "_send")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], ledger: Ledger) -> None:
        self._ledger = ledger
        try:
            self._send = coroutine.send
        except AttributeError:  # an app may return any awaitable, and one that returns none is to be told so
            coroutine = _awaiting(coroutine)
            self._send = coroutine.send
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # the iterator protocol of await: __next__, send, throw, close

    def __iter__(self) -> Driven:
        return self

    def __next__(self) -> Any:
        # What tasks and await call for every step but a thrown one; written out here because it is the hot path.
        ledger = self._ledger
        if ledger.stepping or ledger.finished:
            return self._send(None)
        now = perf_counter()
        if ledger.waits:
            ledger.charge(now)
        ledger.mark = now
        ledger.stepping = True
        try:
            return self._send(None)
        finally:
            ledger.stepping = False
            if not ledger.finished:
                now = perf_counter()
                elapsed = now - ledger.mark
                ledger.mark = now
                ledger.seconds[ON_LOOP] += elapsed
                if elapsed > ledger.longest_step:
                    ledger.longest_step = elapsed

    def send(self, value: Any) -> Any:
        """Run one step."""
        return self._step(self._send, value)

    def throw(self, *error: Any) -> Any:
        """Run one step that begins with an exception, such as a cancellation."""
        return self._step(self._coroutine.throw, *error)

    def close(self) -> None:
        """Close the coroutine."""
        self._coroutine.close()

    def _step(self, step: Callable[..., Any], *arguments: Any) -> Any:
        ledger = self._ledger
        if ledger.stepping or ledger.finished:
            return step(*arguments)
        ledger.charge(perf_counter())
        ledger.stepping = True
        try:
            return step(*arguments)
        finally:
            ledger.stepping = False
            if not ledger.finished:
                ledger.charge_step(perf_counter())

    def __getattr__(self, name: str) -> Any:
        # Introspection (cr_frame, cr_await, __qualname__: Task.get_stack, anyio, debuggers) sees the coroutine itself.
        return getattr(self._coroutine, name)


async def _awaiting(awaitable: Any) -> Any:
    return await awaitable
