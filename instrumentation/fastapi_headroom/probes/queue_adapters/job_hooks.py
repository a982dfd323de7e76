"""What the hooks of arq, Dramatiq and TaskIQ are alike in: when they attach, and where they write."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.queue_adapters.publishing import Publishing
from fastapi_headroom.probes.queue_adapters.runs import Runs
from fastapi_headroom.store.writer import Writer


class JobHooks(ABC):
    """Hooks on one library of this process, attached once, however often they are bound."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._attached = False
        self._patches = Patches()
        self._publishing, self._runs = Publishing(guard), Runs(guard)

    def bind(self, writer: Writer) -> None:
        """Write to ``writer`` from now on, and attach if that was not done before."""
        self._publishing.bind(writer)
        self._runs.bind(writer)
        if not self._attached:
            self._attached = True
            self._attach()

    def close(self) -> None:
        """Detach from everything."""
        self._publishing.bind(None)
        self._runs.bind(None)
        if self._attached:
            self._attached = False
            self._patches.restore()

    @abstractmethod
    def _attach(self) -> None:
        """Wrap the library's methods, by ``_patches``."""
