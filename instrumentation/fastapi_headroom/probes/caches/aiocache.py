"""aiocache's memory: ``SimpleMemoryCache``, also behind its decorators.

Its caches in Redis and memcached talk through redis-py and aiomcache, and are measured there. aiocache has no word for
an entry whose value is None: it is a miss.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from fastapi_headroom.probes.caches.library import Answer, Recorder
from fastapi_headroom.probes.patches import Patches

NAME = "aiocache"


class Aiocache:
    """aiocache's caches inside the process."""

    module: ClassVar[str] = "aiocache.backends.memory"

    def attach(self, recorder: Recorder, patches: Patches) -> None:
        """Wrap the reads of the memory backend, below plugins and time-outs."""
        backend = sys.modules[self.module].SimpleMemoryBackend
        recorder.local(patches, backend, NAME, {"_get": _got, "_multi_get": _got_many, "_exists": _exists})

    def owns(self, thing: Any) -> bool:
        """Return whether something is a memory cache."""
        return isinstance(thing, sys.modules[self.module].SimpleMemoryBackend)


def _got(answer: Answer, key: Any, *_: Any, **__: Any) -> None:
    answer.counted(key, answer.result is not None)


def _got_many(answer: Answer, keys: Any, *_: Any, **__: Any) -> None:
    for key, value in zip(keys, answer.result, strict=False):
        answer.counted(key, value is not None)


def _exists(answer: Answer, key: Any, *_: Any, **__: Any) -> None:
    answer.counted(key, bool(answer.result))
