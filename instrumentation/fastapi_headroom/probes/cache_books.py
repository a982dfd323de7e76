"""The books that task libraries keep in Redis under names of any kind: results of jobs, and queues that are polled.

``cache_rules.BROKER_KEYS`` knows most of them by their beginnings. Of the others the library's own hooks tell: they
mark the connection pool, once. The cache probe asks for the mark when it first meets a pool and keeps what it found
there, so that look-ups on all other pools cost nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache_commands import Command
from fastapi_headroom.probes.cache_series import CacheSeries
from fastapi_headroom.probes.redis_hooks import owner_of

SERIES_KEY: Final = "_fastapi_headroom"
"""The attribute of a client's connection pool (or cluster) that carries its CacheSeries, or its Books."""
_MARK: Final = "_fastapi_headroom_books"
MAX_NAMES: Final = 100
"""Keys of one connection pool that are known as books."""


class _Marked:
    """What of a connection pool is books: all, or the keys with these names."""

    __slots__ = ("all", "names")

    def __init__(self) -> None:
        self.all = False
        self.names: set[str] = set()


class Books:
    """Stands before the series of a cache for a pool that is marked: times its books, and judges none of them."""

    __slots__ = ("_all", "_cache", "_names", "count_timeout", "observe", "writer")

    local: Final = None

    def __init__(self, cache: CacheSeries, marked: _Marked) -> None:
        self.writer, self.observe, self.count_timeout = cache.writer, cache.observe, cache.count_timeout
        self._cache, self._all, self._names = cache, marked.all, marked.names

    def _own(self, args: Sequence[Any]) -> bool:
        return self._all or (len(args) > 1 and isinstance(args[1], str) and args[1] in self._names)

    def answered(
        self, command: Command, args: Sequence[Any], reply: Any, seconds: float, now: float, request: Ledger | None
    ) -> None:
        """Record a command and its reply, as ``CacheSeries`` does where it is none of the books."""
        if self._own(args):
            self.observe(command, seconds)
        else:
            self._cache.answered(command, args, reply, seconds, now, request)

    def judge(self, command: Command, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        """Judge a reply that is none of the books."""
        if not self._own(args):
            self._cache.judge(command, args, reply, now, request)

    def count_errors(self, command: Command, args: Sequence[Any]) -> None:
        """Count the look-ups of a command that raised and that is none of the books."""
        if not self._own(args):
            self._cache.count_errors(command, args)


def mark(client: Any, name: str | None = None) -> None:
    """Say that a library keeps its books under a key, or all over a pool of its own.

    ``client`` is a client, a connection pool, a cluster, or a Sentinel that makes pools.
    """
    attributes = vars(owner_of(client))
    marked = attributes.get(_MARK)
    if marked is None:
        marked = attributes[_MARK] = _Marked()
        attributes.pop(SERIES_KEY, None)
    if name is not None:
        if name not in marked.names and len(marked.names) < MAX_NAMES:
            marked.names.add(name)
    elif not marked.all:
        marked.all = True
        attributes.pop(SERIES_KEY, None)


def before(cache: CacheSeries, owner: Any) -> CacheSeries | Books:
    """Return what records the commands of a connection pool or cluster: its cache, or its books before that."""
    for one in (owner, getattr(owner, "sentinel_manager", None)):
        marked = getattr(one, "__dict__", {}).get(_MARK)
        if marked is not None:
            return Books(cache, marked)
    return cache
