"""The step driver: runs a coroutine step by step and charges each step to the ledger as ``on_loop``.

A step is what happens between two suspensions: one ``send`` or ``throw``. The driver is an object with these
methods and no generator: an exception that is thrown in goes straight to the coroutine and what comes out goes
straight to the caller, so cancellation, ``sys.exc_info()`` and tracebacks are those of the bare coroutine.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from time import perf_counter
from typing import Any, Final

from fastapi_headroom.holds import LONG, SHORT, note_step, of_running_loop
from fastapi_headroom.ledger import ON_LOOP, Ledger
from fastapi_headroom.sockets import awaited_by, seconds_since_data


def blocked(coroutine: Any, suspended: float, now: float) -> float:
    """Return for how many of the last seconds a coroutine that is about to go on was ready, but the loop held.

    The kernel knows when the answer came that it waited for. Where there is no TCP socket, or that says nothing about
    this wait, the loop was held all the while that is counted (see ``holds``). Never raises.
    """
    try:
        holds = of_running_loop()
        held_since = None if holds is None else holds.held_since()
        if holds is None or held_since is None:
            return 0.0
        ready = held_since
        since_data = seconds_since_data(awaited_by(coroutine))
        if since_data is not None and now - since_data >= suspended:
            ready = max(now - since_data, holds.earliest)
        return max(0.0, now - max(ready, suspended))  # the ready moment may be rounded to after now
    except Exception:  # objects of other libraries were looked into
        return 0.0


_SEEN: Final = (
    *("cr_await", "cr_code", "cr_frame", "cr_origin", "cr_running", "cr_suspended"),
    *("gi_code", "gi_frame", "gi_running", "gi_suspended", "gi_yieldfrom"),
)
"""What is to be seen of a coroutine, or of a generator that is one, besides its names. Varies by Python version."""


class Driven(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are timed. It can be awaited once, or given to a task.

    A step within a step of the same request (an eagerly started task) belongs to the outer one. Steps after the
    request has finished (background tasks) do not count, but they hold the loop for others.
    """

    # A class cannot have a property of the name __qualname__, a slot it can. No __getattr__: where there is one, the
    # interpreter finds every attribute the slow way, at each step.
    __slots__ = ("__qualname__", "__weakref__", "_coroutine", "_ledger", "_send")

    def __init__(self, coroutine: Any, ledger: Ledger) -> None:
        """``coroutine`` is one of an ``async def``; see ``DrivenOther`` for all else that can be awaited."""
        self._coroutine: Any = coroutine
        self._ledger = ledger
        self._send = coroutine.send
        self.__qualname__ = coroutine.__qualname__

    @property
    def __name__(self) -> str:
        return self._coroutine.__name__  # type: ignore[no-any-return]

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # the iterator protocol of await: __next__, send, throw, close

    def __iter__(self) -> Driven:
        return self

    def __next__(self) -> Any:
        # What tasks and await call for every step but a thrown one; written out here because it is the hot path.
        ledger, send = self._ledger, self._send
        if ledger.stepping or ledger.finished:
            return send(None) if ledger.stepping else self._step_after(send, None)
        started = perf_counter()
        elapsed = started - ledger.mark
        if elapsed >= LONG:
            ledger.charge(started, blocked(self._coroutine, ledger.mark, started))
        elif waits := ledger.waits:
            try:
                if len(waits) == 1:
                    ledger.seconds[waits[0]] += elapsed
                else:
                    ledger.charge(started)
            except IndexError:
                pass  # a thread of the request closed it at this moment
        ledger.mark = started
        ledger.stepping = True
        try:
            return send(None)
        finally:
            ledger.stepping = False
            now = perf_counter()
            elapsed = now - started
            if not ledger.finished:
                ledger.mark = now
                ledger.seconds[ON_LOOP] += elapsed
                if elapsed > ledger.longest_step:
                    ledger.longest_step = elapsed
            if elapsed >= SHORT:
                note_step(started, now, ledger)

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
            return step(*arguments) if ledger.stepping else self._step_after(step, *arguments)
        now = perf_counter()
        if now - ledger.mark >= LONG:
            ledger.charge(now, blocked(self._coroutine, ledger.mark, now))
        else:
            ledger.charge(now)
        ledger.stepping = True
        try:
            return step(*arguments)
        finally:
            ledger.stepping = False
            ended = perf_counter()
            if not ledger.finished:
                ledger.charge_step(ended)
            if ended - now >= SHORT:
                note_step(now, ended, ledger)

    def _step_after(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Run a step of what goes on when the request has finished."""
        ledger = self._ledger
        started = perf_counter()
        ledger.stepping = True
        try:
            return step(*arguments)
        finally:
            ledger.stepping = False
            ended = perf_counter()
            if ended - started >= SHORT:
                note_step(started, ended, ledger)


def _seen(name: str) -> property:
    # Introspection (Task.get_stack, anyio, debuggers) sees the coroutine itself, and no attribute that it has not.
    return property(lambda driven: getattr(driven._coroutine, name))


for _name in _SEEN:
    setattr(Driven, _name, _seen(_name))


class DrivenOther(Driven):
    """The same for any other awaitable, which may have attributes of its own."""

    __slots__ = ()

    def __init__(self, awaitable: Any, ledger: Ledger) -> None:
        self._ledger = ledger
        try:
            self._send = awaitable.send
        except AttributeError:  # an app may return any awaitable, and one that returns none is to be told so
            awaitable = _awaiting(awaitable)
            self._send = awaitable.send
        self._coroutine = awaitable
        name: str | None = getattr(awaitable, "__qualname__", None)
        if name is not None:
            self.__qualname__ = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)


class Begun(Driven):
    """A coroutine whose first step has been run already: it goes on from where that step was suspended."""

    __slots__ = ()

    def __init__(self, coroutine: Any, ledger: Ledger, awaited: Any) -> None:
        """``awaited`` is what the first step was suspended with."""
        self._coroutine = coroutine
        self._ledger = ledger
        self._send = awaited
        self.__qualname__ = coroutine.__qualname__

    def __next__(self) -> Any:
        awaited: Any = self._send
        self._send = self._coroutine.send
        self.__class__ = Driven  # type: ignore[assignment]
        return awaited


async def _awaiting(awaitable: Any) -> Any:
    return await awaitable
