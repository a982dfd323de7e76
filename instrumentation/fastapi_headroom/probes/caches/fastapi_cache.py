"""fastapi-cache2's memory: ``InMemoryBackend``, which is what ``@cache`` asks.

Its caches in Redis and memcached talk through redis-py and aiomcache, and are measured there.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from fastapi_headroom.probes.caches.library import Answer, Recorder
from fastapi_headroom.probes.patches import Patches

NAME = "fastapi-cache2"


class FastapiCache:
    """fastapi-cache2's caches inside the process."""

    module: ClassVar[str] = "fastapi_cache.backends.inmemory"

    def attach(self, recorder: Recorder, patches: Patches) -> None:
        """Wrap the reads of the memory backend: ``get``, and ``get_with_ttl``, which the decorator calls."""
        backend = sys.modules[self.module].InMemoryBackend
        recorder.local(patches, backend, NAME, {"get": _got, "get_with_ttl": _got_with_ttl})

    def owns(self, thing: Any) -> bool:
        """Return whether something is a memory backend."""
        return isinstance(thing, sys.modules[self.module].InMemoryBackend)


def _got(answer: Answer, key: Any) -> None:
    answer.counted(key, answer.result is not None)


def _got_with_ttl(answer: Answer, key: Any) -> None:
    answer.counted(key, answer.result[1] is not None)
