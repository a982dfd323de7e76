"""What tools see of driven coroutines: debug mode, introspection, warnings, task factories."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import io
import logging
import sys
import time
import warnings
import weakref
from collections.abc import Coroutine, Generator
from typing import Any

import anyio
import pytest

from fastapi_headroom.driver import Driven, DrivenOther
from fastapi_headroom.ledger import Ledger, current
from fastapi_headroom.probes.request_tasks import TaskHook
from tests.support.driven import LOOPS, Alike

eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has eager task factories from 3.12 on")


@pytest.fixture(params=list(LOOPS))
def alike(request: pytest.FixtureRequest) -> Alike:
    return Alike(request.param)


# ------------------------------------------------------------------ debug mode
def test_a_slow_step_is_named_in_debug_mode(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's debug mode reports a slow step by the user's coroutine, file and line, and by where it was created."""

    async def slow_endpoint() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0.1
        await asyncio.sleep(0)
        time.sleep(0.15)  # noqa: ASYNC251 - the fault
        await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.create_task(slow_endpoint())

    descriptions = []
    for driven in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="asyncio"):
            Alike("asyncio").run(main(), driven=driven, debug=True)
        reports = [record.getMessage().split(" took ") for record in caplog.records if " took " in record.getMessage()]
        descriptions.append([what.partition(" coro=")[2] for what, took in reports if float(took.split()[0]) >= 0.15])
    bare, driven_too = descriptions
    assert driven_too == bare
    assert len(bare) == 1
    assert "slow_endpoint() running at" in bare[0]
    assert "test_driver_tools.py" in bare[0].partition("created at ")[2] or "tasks.py" in bare[0]
    assert "fastapi_headroom" not in bare[0]


def test_debug_mode_tells_where_a_task_was_created(alike: Alike) -> None:
    """The traceback of a task's creation, as messages print it, ends at the user's line and has no frame of ours."""

    async def creates() -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(asyncio.sleep(0)), asyncio.get_running_loop().create_task(asyncio.sleep(0))]

    async def program() -> Any:
        tasks: list[Any] = await creates()
        await asyncio.gather(*tasks)
        return [[frame.name for frame in task._source_traceback[-2:]] for task in tasks]

    assert alike(program, debug=True) == [["creates", "create_task"], ["program", "creates"]]


@pytest.mark.parametrize("loop", list(LOOPS))
def test_warnings_of_a_task_that_never_ran(loop: str) -> None:
    """A loop that ends before a task's first step leaves the same messages: pending task, coroutine never awaited."""

    async def forgotten() -> None:
        raise AssertionError("must not run")

    def leave() -> tuple[list[str], list[str]]:
        complaints: list[str] = []
        new = LOOPS[loop]()
        new.set_exception_handler(lambda _, context: complaints.append(context["message"]))
        hook = TaskHook()
        hook.attach(new)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sys.set_coroutine_origin_tracking_depth(3)
            try:
                new.create_task(forgotten(), name="left")
                new.close()
                gc.collect()
            finally:
                sys.set_coroutine_origin_tracking_depth(0)
        return complaints, [str(warning.message) for warning in caught if warning.category is RuntimeWarning]

    bare = leave()
    token = current.set(Ledger())
    try:
        driven = leave()
    finally:
        current.reset(token)
    complaints, messages = bare
    assert driven[0] == complaints == ["Task was destroyed but it is pending!"]
    for _, (message,) in (bare, driven):
        assert message.startswith(
            "coroutine 'test_warnings_of_a_task_that_never_ran.<locals>.forgotten' was never awaited"
        )
        assert "in leave" in message  # where it was created
    assert len(messages) == 1


# ------------------------------------------------------------------ introspection
def test_a_task_can_be_looked_into(alike: Alike) -> None:
    """Stack, name, state and the chain of awaits are the user's; what a task runs passes for a coroutine."""

    async def innermost() -> None:
        await asyncio.sleep(10)

    async def inspected() -> None:
        await innermost()

    async def program() -> Any:
        task = asyncio.create_task(inspected(), name="mine")
        coroutine: Any = task.get_coro()
        seen = [inspect.getcoroutinestate(coroutine)]
        await asyncio.sleep(0)
        seen.append(inspect.getcoroutinestate(coroutine))
        text = io.StringIO()
        task.print_stack(file=text)
        chain, link = [], coroutine
        while hasattr(link, "cr_await"):
            chain.append(link.cr_code.co_name)
            link = link.cr_await
        seen += [chain, [frame.f_code.co_name for frame in task.get_stack()]]
        seen += [
            text.getvalue().count("await innermost()"),
            task.get_name(),
            coroutine.__name__,
            coroutine.__qualname__,
        ]
        seen += [asyncio.iscoroutine(coroutine), inspect.isawaitable(coroutine), weakref.ref(coroutine)() is coroutine]
        seen += [repr(task).count("coro=<test_a_task_can_be_looked_into.<locals>.inspected() running at ")]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return [*seen, inspect.getcoroutinestate(coroutine)]

    name = "test_a_task_can_be_looked_into.<locals>.inspected"
    assert alike(program) == [
        *(inspect.CORO_CREATED, inspect.CORO_SUSPENDED, ["inspected", "innermost", "sleep"], ["inspected"], 1, "mine"),
        *("inspected", name, True, True, True, 1, inspect.CORO_CLOSED),
    ]


def test_an_await_chain_through_the_driver_is_whole() -> None:
    """From the server's coroutine one gets by cr_await to the innermost one, and every frame is there once."""

    async def innermost() -> None:
        await asyncio.sleep(0)

    async def app() -> None:
        await innermost()

    async def server(work: Any) -> None:
        await work

    chains = []
    for work in (app(), Driven(app(), Ledger())):
        coroutine = server(work)
        coroutine.send(None)
        chain, link = [], coroutine
        while (frame := getattr(link, "cr_frame", None)) is not None:
            chain.append(frame.f_code.co_name)
            link = link.cr_await  # type: ignore[assignment]
        chains.append(chain)
        coroutine.close()
    assert chains[0] == chains[1] == ["server", "app", "innermost", "sleep"]


async def test_a_coroutine_of_another_kind_keeps_its_attributes() -> None:
    """A task's coroutine that is an object of a library has its own attributes, and no others, under the driver."""

    async def seven() -> int:
        return 7

    class Job(Coroutine[Any, Any, int]):
        """As libraries write them: no names, and something of its own."""

        number = 3

        def __init__(self) -> None:
            coroutine = seven()
            self.send, self.throw, self.close = coroutine.send, coroutine.throw, coroutine.close

        send = throw = close = None  # type: ignore[assignment]

        def __await__(self) -> Generator[Any, Any, int]:
            return seven().__await__()

    driven = DrivenOther(Job(), Ledger())
    assert driven.number == 3
    assert not hasattr(driven, "cr_frame")
    assert not hasattr(driven, "__qualname__")
    assert await asyncio.create_task(driven) == 7


# ------------------------------------------------------------------ task factories
def test_what_is_no_coroutine_is_refused_in_the_same_words(alike: Alike) -> None:
    """create_task of a future or a number is the TypeError that asyncio raises."""

    async def program() -> Any:
        words = []
        for wrong in (42, None, asyncio.sleep):
            with pytest.raises(TypeError) as caught:
                await asyncio.create_task(wrong)  # type: ignore[arg-type]
            words.append(str(caught.value))
        return words

    assert alike(program)[0] == "a coroutine was expected, got 42"


async def test_a_task_factory_of_the_user_before_and_after() -> None:
    """One that is there is called for every task, with its arguments and a coroutine; one set later replaces ours."""
    loop = asyncio.get_running_loop()
    calls: list[Any] = []

    def users(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        calls.append((asyncio.iscoroutine(coroutine), coroutine.__name__, sorted(options)))
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(users)
    hook = TaskHook()
    hook.attach(loop)
    token = current.set(Ledger())
    try:
        options = {"context": contextvars.copy_context(), "name": "x"}
        task = asyncio.create_task(asyncio.sleep(0), **options)  # type: ignore[arg-type]
        assert type(task.get_coro()) is Driven
        await task
        assert task.get_name() == "x"
        assert [call[:2] for call in calls] == [(True, "sleep")]
        assert "context" in calls[0][2]

        def later(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
            return asyncio.Task(coroutine, loop=loop, **options)

        loop.set_task_factory(later)
        task = asyncio.create_task(asyncio.sleep(0))
        assert type(task.get_coro()) is not Driven
        await task
        hook.detach()
        assert loop.get_task_factory() is later
        loop.set_task_factory(users)
        hook.attach(loop)
        hook.detach()
        assert loop.get_task_factory() is users
    finally:
        current.reset(token)
        loop.set_task_factory(None)


@eager
@pytest.mark.parametrize("driven", [False, True])
async def test_eager_tasks_start_at_once(driven: bool) -> None:
    """Under asyncio.eager_task_factory a driven task runs its first step when it is made, and may end in it."""
    loop, log = asyncio.get_running_loop(), []
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    hook = TaskHook()
    hook.attach(loop)
    token = current.set(Ledger() if driven else None)

    async def work(name: str, turns: int) -> None:
        log.append(f"{name} begins")
        for _ in range(turns):
            await asyncio.sleep(0)
        log.append(f"{name} ends")

    try:
        first = asyncio.create_task(work("first", 0))
        assert first.done()
        second = asyncio.create_task(work("second", 1))
        log.append("made")
        await second
        async with anyio.create_task_group() as group:  # its tasks must not start before it knows them
            group.start_soon(work, "third", 1)
            log.append("spawned")
        with anyio.move_on_after(0.01):
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 10)
    finally:
        current.reset(token)
        hook.detach()
        assert loop.get_task_factory() is asyncio.eager_task_factory  # type: ignore[attr-defined]
        loop.set_task_factory(None)
    assert log == [
        *("first begins", "first ends", "second begins", "made", "second ends"),
        *("spawned", "third begins", "third ends"),
    ]
