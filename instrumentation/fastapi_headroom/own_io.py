"""File access of our own on the thread of a running loop: a few milliseconds, once per process.

A worker claims its slot when it first serves, which is on the loop. Tools that make an error of each blocking call
there, as blockbuster does in test suites, would leave the process unmeasured. They ask whether a loop runs.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class own_io:  # noqa: N801 (reads as what is done)
    """Let code make blocking calls on a loop's thread. It must not await, and start no task. Nests."""

    __slots__ = ("_loop",)

    def __enter__(self) -> None:
        self._loop = asyncio._get_running_loop()
        if self._loop is not None:
            asyncio._set_running_loop(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._loop is not None:
            asyncio._set_running_loop(self._loop)
