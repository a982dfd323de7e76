"""cashews' memory: ``mem://``, also behind its decorators, and the memory in front of Redis (``client_side=True``).

Its caches in Redis talk through redis-py, and are measured there. What cashews asks its memory for itself is no
look-up: its task that throws out what has expired reads every entry every second, a transaction looks at its own writes
first, and the listener for invalidations remembers in such a cache what it wrote. ``get_match`` is none either: it
finds what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, Final

from fastapi_headroom.probes.caches.library import Answer, Recorder
from fastapi_headroom.probes.patches import Patches

NAME = "cashews"
_CLIENT_SIDE: Final = "cashews.backends.redis.client_side"
_TRANSACTION: Final = "cashews.backends.transaction"


class Cashews:
    """cashews' caches inside the process."""

    module: ClassVar[str] = "cashews.backends.memory"

    def __init__(self) -> None:
        self._own: frozenset[int] = frozenset()
        """Identities of the code in cashews whose reads are none of the app's."""
        self._transactions: dict[str, Any] | None = None
        self._absent: object = None
        """What the memory in front of Redis holds for a key that Redis does not have."""

    def attach(self, recorder: Recorder, patches: Patches) -> None:
        """Wrap the reads of the memory backend. Raises AttributeError for a version whose inner reads are not known.

        Before cashews 7.5 the backend inherits its reads from what Redis' backend shares: those are left alone.
        """
        memory = sys.modules[self.module].Memory
        if "get" not in vars(memory):
            return
        own = [memory._remove_expired, memory.get_match]
        client_side, transactions = sys.modules.get(_CLIENT_SIDE), sys.modules.get(_TRANSACTION)
        if client_side is not None:
            backend, self._absent = client_side.BcastClientSide, client_side._empty_in_redis
            own += backend._listen_invalidate, backend.expire
        self._own = frozenset(id(function.__code__) for function in own)
        self._transactions = None if transactions is None else vars(transactions)
        reads: dict[str, Callable[..., None]] = {"get": self._got, "get_many": self._got_many, "exists": _exists}
        recorder.local(patches, memory, NAME, reads, skip=self._is_own)

    def owns(self, thing: Any) -> bool:
        """Return whether something is a memory backend, as ``cache.setup("mem://")`` returns it."""
        return isinstance(thing, sys.modules[self.module].Memory)

    def _is_own(self, cache: Any, caller: FrameType) -> bool:
        # What a transaction has written lies in a memory that is never started, unlike those of ``setup``.
        return id(caller.f_code) in self._own or (caller.f_globals is self._transactions and not cache.is_init)

    def _got(self, answer: Answer, key: Any, default: Any = None) -> None:
        answer.counted(key, answer.result is not default and answer.result is not self._absent)

    def _got_many(self, answer: Answer, *keys: Any, default: Any = None) -> None:
        if len(keys) == len(answer.result):  # it leaves out bit fields, and does not tell which keys those were
            for key, value in zip(keys, answer.result, strict=True):
                answer.counted(key, value is not default and value is not self._absent)


def _exists(answer: Answer, key: Any) -> None:
    answer.counted(key, bool(answer.result))
