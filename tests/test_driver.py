"""The step driver is transparent: every program here does the same bare and driven, awaited and as a task.

Cancellation, exceptions, context variables, generators and clean-up; what tools see is in ``test_driver_tools``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from fastapi_headroom.driver import Driven
from fastapi_headroom.ledger import Ledger
from tests.support.driven import LOOPS, VARIABLE, Alike

pytestmark = pytest.mark.alone


@pytest.fixture(params=list(LOOPS))
def alike(request: pytest.FixtureRequest) -> Alike:
    return Alike(request.param)


async def cancelled(work: Coroutine[Any, Any, Any], *times: int) -> Any:
    """Run work as a task and cancel it after so many turns of the loop each; return its result or what it raised."""
    task = asyncio.create_task(work)
    for turns in times:
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel(f"after {turns}")
    try:
        return await task, task.cancelling()
    except BaseException as error:
        return type(error), error.args, task.cancelling(), task.cancelled()


# ------------------------------------------------------------------ cancellation
def test_second_cancellation_while_the_first_is_handled(alike: Alike) -> None:
    """Both arrive, with their messages, and the clean-up of each runs; a third one within the clean-up, too."""

    async def program() -> Any:
        log: list[Any] = []

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError as first:
                log.append(("first", first.args))
                try:
                    await asyncio.sleep(10)
                except asyncio.CancelledError as second:
                    log.append(("second", second.args, second.__context__ is first))
                    try:
                        await asyncio.sleep(10)
                    finally:
                        log.append(("third", sys.exc_info()[1].args))  # type: ignore[union-attr]

        return await cancelled(work(), 1, 2, 3), log

    outcome, log = alike(program)
    assert outcome[0] is asyncio.CancelledError
    assert log == [("first", ("after 1",)), ("second", ("after 2",), True), ("third", ("after 3",))]


def test_a_cancellation_that_is_swallowed(alike: Alike) -> None:
    """Work that swallows its cancellation, and uncancels, goes on and ends well."""

    async def program() -> Any:
        async def work() -> Any:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                counts = task.cancelling(), task.uncancel()
            await asyncio.sleep(0)
            return counts, sys.exc_info()

        return await cancelled(work(), 1)

    assert alike(program) == (((1, 0), (None, None, None)), 0)


def test_move_on_after(alike: Alike) -> None:
    """anyio.move_on_after ends what it guards and nothing else: nested, shielded, and with work in its clean-up."""

    async def program() -> Any:
        log: list[Any] = []
        with anyio.move_on_after(5) as outer, anyio.move_on_after(0.01) as inner:
            try:
                await anyio.sleep(10)
            finally:
                log.append("clean")
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
                    log.append("shielded")
                with contextlib.suppress(anyio.get_cancelled_exc_class()):
                    await anyio.sleep(10)
                    log.append("not reached")
        log.append((outer.cancelled_caught, inner.cancelled_caught, sys.exc_info()))
        await anyio.lowlevel.checkpoint()
        task = asyncio.current_task()
        assert task is not None
        return log, task.cancelling()

    assert alike(program) == (["clean", "shielded", (False, True, (None, None, None))], 0)


def test_fail_after(alike: Alike) -> None:
    """anyio.fail_after raises TimeoutError, once, and outer work goes on."""

    async def program() -> Any:
        with pytest.raises(TimeoutError) as caught:
            with anyio.fail_after(0.01):
                await anyio.sleep(10)
        await anyio.sleep(0.001)
        return type(caught.value.__context__), sys.exc_info()

    assert alike(program) == (asyncio.CancelledError, (None, None, None))


def test_anyio_task_groups(alike: Alike) -> None:
    """A child that fails cancels its siblings; start() hands over; the group raises what bare ones raise."""

    async def program() -> Any:
        log: list[Any] = []

        async def service(*, task_status: anyio.abc.TaskStatus[str]) -> None:
            task_status.started("ready")
            try:
                await anyio.sleep(10)
            finally:
                log.append("service ends")

        async def fails() -> None:
            await anyio.sleep(0.01)
            raise LookupError("gone")

        try:
            async with anyio.create_task_group() as group:
                log.append(await group.start(service))
                group.start_soon(fails)
                await anyio.sleep(10)
        except* LookupError as errors:
            log.append([str(error) for error in errors.exceptions])
        return log

    assert alike(program) == ["ready", "service ends", ["gone"]]


def test_cancelling_a_scope_from_another_task(alike: Alike) -> None:
    """A scope that a sibling cancels before its task's first step, and one in the middle, end their tasks only."""

    async def program() -> Any:
        log: list[str] = []

        async def child(name: str) -> None:
            try:
                await anyio.sleep(10)
            except BaseException as error:
                log.append(f"{name} {type(error).__name__}")
                raise

        async with anyio.create_task_group() as group:
            group.start_soon(child, "early")
            group.cancel_scope.cancel()
        async with anyio.create_task_group() as group:
            group.start_soon(child, "late")
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        return log

    assert "late CancelledError" in alike(program)


def test_asyncio_timeout_and_wait_for(alike: Alike) -> None:
    """asyncio.timeout and wait_for raise TimeoutError; a cancellation from outside during them stays one."""

    async def program() -> Any:
        log: list[Any] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        log.append(sys.exc_info()[0])
        try:
            await asyncio.wait_for(asyncio.sleep(10), 0.01)
        except TimeoutError as error:
            log.append(type(error.__cause__ or error.__context__))

        async def guarded() -> None:
            async with asyncio.timeout(10):
                await asyncio.sleep(10)

        log.append(await cancelled(guarded(), 2))
        return log

    assert alike(program)[2][0] is asyncio.CancelledError


def test_asyncio_task_groups(alike: Alike) -> None:
    """One child fails, the others are cancelled and clean up by awaiting, the parent sees one group."""

    async def program() -> Any:
        log: list[str] = []

        async def other(number: int) -> None:
            try:
                await asyncio.sleep(10)
            finally:
                await asyncio.sleep(0)
                log.append(f"other {number}")

        async def fails() -> None:
            await asyncio.sleep(0)
            raise LookupError

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(3):
                    group.create_task(other(number))
                group.create_task(fails())
        except* LookupError as errors:
            log.append(f"raised {len(errors.exceptions)}")
        return log[-1], sorted(log)  # a group keeps its tasks in a set

    assert alike(program) == ("raised 1", ["other 0", "other 1", "other 2", "raised 1"])


# ------------------------------------------------------------------ exceptions
def test_exc_info_is_clean(alike: Alike) -> None:
    """sys.exc_info() is the exception that is being handled, across waits, and none otherwise."""

    async def program() -> Any:
        seen: list[Any] = [sys.exc_info()[0]]
        try:
            raise KeyError
        except KeyError:
            await asyncio.sleep(0)
            seen.append(sys.exc_info()[0])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.sleep(10)
            seen.append(sys.exc_info()[0])
        await asyncio.sleep(0)
        seen.append(sys.exc_info()[0])
        try:
            raise ValueError
        except ValueError as error:
            seen.append(error.__context__)
        return seen

    assert alike(program) == [None, KeyError, KeyError, None, None]


def test_an_exception_that_the_caller_handles_is_the_context(alike: Alike) -> None:
    """What is raised inside while the caller handles an exception has that one as its context, and it stays current."""

    async def program() -> Any:
        async def inner() -> Any:
            seen = sys.exc_info()[0]
            await asyncio.sleep(0)
            try:
                raise ValueError
            except ValueError as error:
                return seen, type(error.__context__)

        try:
            raise KeyError
        except KeyError:
            return await inner(), sys.exc_info()[0]

    assert alike(program) == ((KeyError, KeyError), KeyError)


def test_tracebacks_have_the_users_frames(alike: Alike) -> None:
    """All frames of the user are there in order, and per driven coroutine at most two of ours; causes are untouched."""

    async def deepest() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    async def middle() -> None:
        try:
            await deepest()
        except LookupError as error:
            error.add_note("noted")
            raise RuntimeError("broken") from error

    async def program() -> Any:
        try:
            await middle()
        finally:
            await asyncio.sleep(0)

    async def main(way: Any) -> Any:
        try:
            await way
        except RuntimeError as error:
            cause = error.__cause__
            assert error.__context__ is cause
            assert cause is not None
            return traceback.extract_tb(error.__traceback__), (
                str(cause),
                cause.__notes__,
                cause.__context__,
                error.__suppress_context__,
                [frame.name for frame in traceback.extract_tb(cause.__traceback__)],
            )

    bare, bare_cause = alike.run(main(program()), driven=False)

    async def driven_main() -> Any:
        return await main(Driven(program(), Ledger()))

    driven, driven_cause = alike.run(driven_main(), driven=False)
    ours = [frame for frame in driven if frame.filename.endswith("fastapi_headroom/driver.py")]
    assert [frame.name for frame in driven if frame not in ours] == [frame.name for frame in bare]
    assert [frame.name for frame in bare] == ["main", "program", "middle"]
    assert 1 <= len(ours) <= 2
    assert driven_cause == bare_cause
    assert bare_cause[4] == ["middle", "deepest"]


def test_exceptions_in_finally(alike: Alike) -> None:
    """An exception raised by clean-up replaces the cancellation and has it as its context; outer ones still run."""

    async def program() -> Any:
        log: list[Any] = []

        async def work() -> None:
            try:
                try:
                    await asyncio.sleep(10)
                finally:
                    await asyncio.sleep(0)
                    raise ValueError("clean-up")
            finally:
                error = sys.exc_info()[1]
                assert error is not None
                log.append((type(error), type(error.__context__)))

        return await cancelled(work(), 1), log

    outcome, log = alike(program)
    assert outcome[:2] == (ValueError, ("clean-up",))
    assert log == [(ValueError, asyncio.CancelledError)]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_gets_through(alike: Alike, kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit run the clean-up and leave the loop."""
    log: list[str] = []

    async def program() -> None:
        try:
            await asyncio.sleep(0)
            raise kind("now")
        finally:
            log.append("clean")

    assert alike(program) == (kind, "now")
    assert log == ["clean"] * 4


def test_values_and_errors_of_iterators(alike: Alike) -> None:
    """Results that are tuples or exceptions arrive whole; StopIteration raised inside is a RuntimeError."""

    async def program() -> Any:
        async def value(of: Any) -> Any:
            await asyncio.sleep(0)
            return of

        async def stops(kind: type[Exception]) -> Any:
            await asyncio.sleep(0)
            raise kind("inside")

        values = (None, (1, 2), StopIteration(3), ValueError(4), StopAsyncIteration(5))
        log: list[Any] = [repr(await asyncio.create_task(value(of))) for of in values]
        for kind in (StopIteration, StopAsyncIteration, GeneratorExit):
            try:
                await asyncio.create_task(stops(kind))  # type: ignore[arg-type]
            except BaseException as error:
                log.append((type(error), str(error), type(error.__cause__)))
        return log

    log = alike(program)
    assert log[1:3] == ["(1, 2)", "StopIteration(3)"]
    assert log[5] == (RuntimeError, "coroutine raised StopIteration", StopIteration)


# ------------------------------------------------------------------ context variables, tasks, threads
def test_context_variables(alike: Alike) -> None:
    """Set inside, they are seen by the caller; tokens reset across waits; a child task has a copy."""

    async def program() -> Any:
        async def inner() -> str:
            token = VARIABLE.set("inner")
            await asyncio.sleep(0)
            VARIABLE.reset(token)
            VARIABLE.set("left")
            await asyncio.create_task(child())
            return VARIABLE.get()

        async def child() -> None:
            VARIABLE.set("child")
            await asyncio.sleep(0)

        threaded = await inner(), await asyncio.to_thread(VARIABLE.get), await anyio.to_thread.run_sync(VARIABLE.get)
        return threaded, VARIABLE.get()

    assert alike(program) == (("left", "left", "left"), "left")

    async def caller(work: Any) -> str:
        await work
        return VARIABLE.get()

    async def sets() -> None:
        await asyncio.sleep(0)
        VARIABLE.set("seen by the caller")

    for work in (sets(), Driven(sets(), Ledger())):
        assert alike.run(caller(work), driven=False) == "seen by the caller"


def test_current_task_and_library(alike: Alike) -> None:
    """current_task() is the same within a step, after a wait and in a nested await; AnyIO knows library and task."""

    async def program() -> Any:
        task = asyncio.current_task()

        async def inner() -> bool:
            await asyncio.sleep(0)
            return asyncio.current_task() is task

        same = await inner()
        assert task is not None
        info = anyio.get_current_task()
        await anyio.to_thread.run_sync(anyio.from_thread.run_sync, lambda: None)
        backend = anyio.get_cancelled_exc_class() is asyncio.CancelledError
        children = {child.get_name() for child in await _two_children()}
        return same, info.id == id(task), info.name == task.get_name(), backend, children, len(asyncio.all_tasks())

    async def _two_children() -> list[asyncio.Task[None]]:
        children = [asyncio.create_task(asyncio.sleep(0), name=f"child {number}") for number in range(2)]
        await asyncio.gather(*children)
        return children

    assert alike(program)[:5] == (True, True, True, True, {"child 0", "child 1"})


# ------------------------------------------------------------------ generators and clean-up
def test_async_generators_athrow_and_aclose(alike: Alike) -> None:
    """athrow and aclose reach the generator at its yield, its clean-up may wait, and it ends as it would bare."""

    async def program() -> Any:
        log: list[Any] = []

        async def numbers() -> AsyncGenerator[int, None]:
            try:
                for number in range(10):
                    try:
                        await asyncio.sleep(0)
                        yield number
                    except LookupError as error:
                        log.append(str(error))
            except BaseException as error:
                log.append((type(error).__name__, type(error.__context__)))
                raise
            finally:
                await asyncio.sleep(0)
                log.append("closed")

        first: Any = numbers()
        log.append(await anext(first))
        log.append(await first.athrow(LookupError("thrown")))
        await first.aclose()
        async with contextlib.aclosing(numbers()) as second:
            async for number in second:
                if number == 2:
                    break
        third: Any = numbers()
        await anext(third)
        try:
            await third.athrow(ValueError("thrown"))
        except ValueError as error:
            log.append(sys.exc_info()[1] is error)
        abandoned: Any = numbers()
        await anext(abandoned)
        del abandoned
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)  # the loop's hook closes it in a task
        return log

    log = alike(program)
    assert log[:4] == [0, "thrown", 1, ("GeneratorExit", type(None))]
    assert log.count("closed") == 4


def test_order_of_clean_up_under_cancellation(alike: Alike) -> None:
    """async with blocks, exit stacks and generators of dependencies close inside out, and each may wait."""

    async def program() -> Any:
        log: list[str] = []

        @contextlib.asynccontextmanager
        async def resource(name: str) -> AsyncIterator[None]:
            log.append(f"open {name}")
            try:
                yield
            except BaseException as error:
                log.append(f"{name} sees {type(error).__name__}")
                raise
            finally:
                await asyncio.sleep(0)
                log.append(f"close {name}")

        async def work() -> None:
            async with resource("a"), contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(resource("b"))
                async with resource("c"):
                    await asyncio.sleep(10)

        await cancelled(work(), 1)
        return log

    assert alike(program)[3:] == [step for name in "cba" for step in (f"{name} sees CancelledError", f"close {name}")]


def test_closing_a_coroutine_that_is_abandoned() -> None:
    """close() and a lost reference run the clean-up with GeneratorExit; a coroutine that waits in it is told off."""
    seen: dict[str, list[Any]] = {}
    for way in ("bare", "driven"):
        log = seen[way] = []

        async def tidy(log: list[Any]) -> None:
            try:
                await asyncio.sleep(0)
            except BaseException as error:
                log.append(type(error))
                raise
            finally:
                log.append(sys.exc_info()[0])

        async def stubborn() -> None:
            try:
                await asyncio.sleep(0)
            finally:
                await asyncio.sleep(0)

        async def outer(work: Any) -> None:
            await work

        def make(coroutine: Coroutine[Any, Any, None]) -> Any:
            return outer(coroutine if way == "bare" else Driven(coroutine, Ledger()))  # noqa: B023

        for end in ("close", "throw", "drop"):
            coroutine = make(tidy(log))
            coroutine.send(None)
            if end == "close":
                coroutine.close()
            elif end == "throw":
                with pytest.raises(GeneratorExit):
                    coroutine.throw(GeneratorExit)
            del coroutine
            gc.collect()
        coroutine = make(stubborn())
        coroutine.send(None)
        with pytest.raises(RuntimeError) as caught:
            coroutine.close()
        log.append(str(caught.value))
        coroutine.close()
        log.append(sys.exc_info()[0])
    assert seen["driven"] == seen["bare"]
    assert seen["bare"] == [GeneratorExit] * 6 + ["coroutine ignored GeneratorExit", None]


# ------------------------------------------------------------------ SQLAlchemy's greenlets
def test_cancellation_within_a_greenlet(alike: Alike) -> None:
    """A cancellation that arrives inside greenlet_spawn runs the clean-up in the greenlet, a second one as well."""

    async def program() -> Any:
        log: list[Any] = []

        def synchronous() -> None:
            VARIABLE.set("greenlet")
            try:
                await_only(asyncio.sleep(10))
            except asyncio.CancelledError:
                log.append(sys.exc_info()[0])
                try:
                    await_only(asyncio.sleep(10))
                finally:
                    log.append((sys.exc_info()[0], asyncio.current_task() is not None, VARIABLE.get()))
                    await_only(asyncio.sleep(0))
                    log.append("waited")

        async def work() -> None:
            try:
                await greenlet_spawn(synchronous)
            finally:
                log.append(VARIABLE.get())

        return await cancelled(work(), 2, 2), log, sys.exc_info()

    outcome, log, exc_info = alike(program)
    assert outcome[0] is asyncio.CancelledError
    assert log[:3] == [asyncio.CancelledError, (asyncio.CancelledError, True, "greenlet"), "waited"]
    assert exc_info == (None, None, None)


def test_a_cancelled_query_gives_its_connection_back(alike: Alike) -> None:
    """Work cancelled while it waits for a pool of one, or holds its connection, leaves the pool whole and usable."""

    async def program() -> Any:
        engine = create_async_engine(
            "sqlite+aiosqlite:///:memory:", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0
        )
        held = asyncio.Event()

        async def holds() -> None:
            async with engine.connect() as connection:
                await connection.exec_driver_sql("select 1")
                held.set()
                await asyncio.sleep(10)

        async def waits() -> None:
            async with engine.connect():
                raise AssertionError("the pool has one connection")

        async def ended(task: asyncio.Task[None]) -> Any:
            task.cancel()
            return type((await asyncio.gather(task, return_exceptions=True))[0])

        holder = asyncio.create_task(holds())
        await held.wait()
        waiter = asyncio.create_task(waits())
        await asyncio.sleep(0.02)
        kinds = [await ended(waiter), await ended(holder)]
        async with asyncio.timeout(5), engine.connect() as connection:
            answer = (await connection.exec_driver_sql("select 2")).scalar()
        status = engine.pool.checkedout()  # type: ignore[attr-defined]
        await engine.dispose()
        return kinds, answer, status

    assert alike(program) == ([asyncio.CancelledError] * 2, 2, 0)
