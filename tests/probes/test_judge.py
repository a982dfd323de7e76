"""Who kept the GIL: what used most CPU since all threads were looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fastapi_headroom.probes.blame import Sample
from fastapi_headroom.probes.judge import Judge


@contextmanager
def a_thread(cpu: float) -> Iterator[threading.Thread]:
    """A thread that has used so many seconds of CPU, and waits."""
    ready, done = threading.Event(), threading.Event()

    def compute() -> None:
        while time.thread_time() < cpu:
            pass
        ready.set()
        done.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    ready.wait()
    try:
        yield thread
    finally:
        done.set()
        thread.join()


def sample(site: str) -> Sample:
    return Sample(site, (1, 1, 1), in_call=True, waited=0.0, stack=())


def test_what_a_thread_computed_before_the_watch_began_is_not_counted() -> None:
    """When the first look of all fell into the block, an old thread that now waits is not taken for the one at work."""
    with a_thread(0.3) as old:
        pulse: Any = None  # not asked who kept the GIL
        judge = Judge(0.1, pulse)
        held: Any = SimpleNamespace(earliest=time.monotonic(), culprit=None)
        with a_thread(0.2) as young:
            judge.look_at_threads()  # all was well, it seemed, and the block had begun
            judge.elsewhere = {old.ident or 0: sample("app:old:1"), young.ident or 0: sample("app:young:1")}
            culprit = judge._find_culprit(held, 0.05)
    assert culprit is not None
    assert culprit.site == "app:young:1"
