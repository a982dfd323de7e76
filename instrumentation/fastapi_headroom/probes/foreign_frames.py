"""Lets frames of other threads be read without a crash.

CPython up to 3.11 may run the garbage collector whenever an object is made, and so while it makes one for a frame of
another thread. The collector runs Python code (callbacks, finalizers), which may give the GIL away; the other thread
goes on, its frame is gone, and the object is tied to memory that is something else by then: a crash, sooner or later.
From 3.12 on the collector waits for the next instruction.

So on 3.11 the collector rests while a stack is walked: some ten microseconds. An app that calls ``gc.disable()`` within
them finds it enabled again.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Final


class _CollectorRests:
    """One walk at a time: the first to end would wake the collector for the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._woken = False
        """The collector is to go on at the end of the walk."""

    def __enter__(self) -> None:
        self._lock.acquire()
        self._woken = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._woken:
            gc.enable()
        self._woken = False
        self._lock.release()

    def forked(self) -> None:
        """Forget the walk of a thread that is not in this child."""
        if self._woken:
            gc.enable()
        self.__init__()  # type: ignore[misc]


_rests: Final = _CollectorRests()
_nothing: Final = nullcontext()
if sys.version_info < (3, 12):
    os.register_at_fork(after_in_child=_rests.forked)


def walking() -> AbstractContextManager[None]:
    """Return the context in which frames of other threads are asked for, and their callers and variables."""
    return _rests if sys.version_info < (3, 12) else _nothing
