"""An asyncio loop on a clock that stands still unless it is told to move: programs of known length, in no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest

from fastapi_headroom import driver, holds, ledger


class Clock:
    """Seconds that pass when code takes them, or when the loop has nothing to do."""

    def __init__(self) -> None:
        self.now = 1000.0

    def take(self, seconds: float) -> None:
        """Hold the thread for so long."""
        self.now += seconds

    def __call__(self) -> float:
        return self.now


class _Selector(selectors.BaseSelector):
    """Sees no socket, and lets the time pass for which it is asked to wait."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "the program waits for nothing"
        self._clock.now += max(0.0, timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, fileobj if isinstance(fileobj, int) else fileobj.fileno(), events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self.register(fileobj, 0)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time is the clock's."""

    def __init__(self, clock: Clock) -> None:
        self._virtual = clock
        super().__init__(_Selector(clock))

    def time(self) -> float:
        return self._virtual.now


class Kernel:
    """Knows when each task's answer came, as TCP_INFO does."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._answers: dict[Any, float] = {}

    async def answer(self, seconds: float) -> None:
        """Wait for data that come after so many seconds."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        self._answers[task] = self._clock.now + seconds
        future = loop.create_future()
        loop.call_later(seconds, future.set_result, None)
        try:
            await future
        finally:
            del self._answers[task]

    def awaited(self, _: Any) -> float | None:
        """Return when the answer came that the running task is about to take."""
        return self._answers.get(asyncio.current_task())

    def seconds_since(self, moment: float | None) -> float | None:
        """Return how long ago that was."""
        return None if moment is None else self._clock.now - moment


def run(monkeypatch: pytest.MonkeyPatch, clock: Clock, kernel: Kernel, main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a virtual loop, the ledger on its clock."""
    with monkeypatch.context() as patch:
        for module in (driver, holds, ledger):
            patch.setattr(module, "perf_counter", clock)
        patch.setattr(driver, "awaited_by", kernel.awaited)
        patch.setattr(driver, "seconds_since_data", kernel.seconds_since)
        loop = VirtualLoop(clock)
        try:
            return loop.run_until_complete(main)
        finally:
            loop.close()
