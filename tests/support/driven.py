"""Runs one program bare and under the step driver, and demands that it sees and does the same."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from fastapi_headroom.driver import Driven
from fastapi_headroom.ledger import ON_LOOP, Ledger, current
from fastapi_headroom.probes.request_tasks import TaskHook

Program = Callable[[], Coroutine[Any, Any, Any]]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class Alike:
    """Runs a program four ways: awaited and as a task of its own, each bare and driven."""

    def __init__(self, loop: str) -> None:
        self.new_loop = LOOPS[loop]

    def __call__(self, program: Program, *, debug: bool = False) -> Any:
        """Return what the program returned, or the exception that it raised as (type, text). The same all four ways."""
        for wrap in (_awaited, _as_task):
            bare = self.run(wrap(program), driven=False, debug=debug)
            driven = self.run(wrap(program), driven=True, debug=debug)
            assert driven == bare
        return driven

    def run(self, main: Coroutine[Any, Any, Any], *, driven: bool, debug: bool = False) -> Any:
        """Run on a new loop; with ``driven`` as the middle of a request, whose tasks are driven too."""
        with asyncio.Runner(loop_factory=self.new_loop, debug=debug) as runner:
            try:
                return runner.run(request(main) if driven else main)
            except BaseException as error:
                return type(error), str(error)


async def request(main: Coroutine[Any, Any, Any]) -> Any:
    """Await a coroutine as the request probe does, and make sure that its steps were timed."""
    hook, ledger = TaskHook(), Ledger()
    hook.attach(asyncio.get_running_loop())
    outer = current.get()
    current.set(ledger)
    try:
        return await Driven(main, ledger)
    finally:
        current.set(outer)
        hook.detach()
        assert ledger.seconds[ON_LOOP] > 0
        assert not ledger.stepping


async def _awaited(program: Program) -> Any:
    return await program()


async def _as_task(program: Program) -> Any:
    task = asyncio.create_task(program(), name="program")
    assert (type(task.get_coro()) is Driven) is (current.get() is not None)
    return await task


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
