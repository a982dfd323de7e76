"""TaskIQ's results in Redis, under bare task ids: told to the cache probe as books.

Polling for a result that is not there yet is no miss of a cache.

A result backend is most often made before anything is measured, so its pool is marked when it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import taskiq_redis.redis_backend
from taskiq import AsyncResultBackend

from fastapi_headroom.probes import cache_books
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.store.writer import Writer

_METHODS: Final = ("set_result", "is_result_ready", "get_result", "set_progress", "get_progress")
_LINKS: Final = ("redis_pool", "redis", "sentinel")
"""Where a backend has its connections: plain, cluster, sentinel."""


class TaskiqResults:
    """Hooks on the result backends of taskiq-redis."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._patches = Patches()
        self._attached = False

    def bind(self, writer: Writer) -> None:
        """Attach, if that was not done before; nothing is written."""
        if not self._attached:
            self._attached = True
            for kind in vars(taskiq_redis.redis_backend).values():
                if isinstance(kind, type) and issubclass(kind, AsyncResultBackend):
                    for name in _METHODS:
                        if kind is not AsyncResultBackend and name in vars(kind):
                            self._patches.wrap(kind, name, self._wrap)

    def close(self) -> None:
        """Detach from everything."""
        self._attached = False
        self._patches.restore()

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def use(backend: Any, *args: Any, **kwargs: Any) -> Any:
            if self._attached:
                self._mark(backend)
            return await original(backend, *args, **kwargs)

        return use

    def _mark(self, backend: Any) -> None:
        try:
            for link in _LINKS:
                if (found := getattr(backend, link, None)) is not None:
                    cache_books.mark(found)
        except Exception as error:
            self._guard.failed(error)
