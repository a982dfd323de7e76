"""The thread that samples does half as much while nothing happens, and misses nothing that comes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fastapi_headroom import settings
from fastapi_headroom.probes.loop import LoopProbe
from fastapi_headroom.wiring import Runtime


class Ticks(threading.Event):
    """Lets a number of intervals pass at once, and calls before each what stands for what happens meanwhile."""

    def __init__(self, count: int, meanwhile: Callable[[int], None]) -> None:
        super().__init__()
        self._left, self._meanwhile = iter(range(count)), meanwhile

    def wait(self, timeout: float | None = None) -> bool:
        tick = next(self._left, None)
        if tick is not None:
            self._meanwhile(tick)
        return tick is None


@pytest.mark.parametrize(
    ("at_rest", "interval", "imported", "sampled"),
    [
        (True, 1.0, None, [0, 2, 4]),
        (False, 1.0, None, [0, 1, 2, 3, 4, 5]),
        (True, 2.0, None, [0, 1, 2, 3, 4, 5]),
        (True, 1.0, 3, [0, 2, 3, 5]),
    ],
    ids=["rest", "work", "long interval", "import"],
)
def test_every_other_sample_is_left_out_at_rest(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_rest: bool,
    interval: float,
    imported: int | None,
    sampled: list[int],
) -> None:
    """At rest gauges are written every other second, unless something was imported or they are written rarely."""
    runtime = Runtime(settings.load({}, directory=tmp_path, sample_interval=interval))
    monkeypatch.setattr(LoopProbe, "at_rest", at_rest)
    now = -1
    found: list[int] = []

    def meanwhile(tick: int) -> None:
        nonlocal now
        now = tick
        if tick == imported:
            monkeypatch.setitem(sys.modules, "imported_meanwhile", ModuleType("imported_meanwhile"))

    monkeypatch.setattr(runtime.loop, "sample", lambda: found.append(now))
    runtime.probes = (runtime.loop,)
    try:
        runtime._sample(Ticks(6, meanwhile))
    finally:
        runtime.unwatch()
    assert found == sampled
