"""fastapi-headroom: how much is left before this app falls over, what gives way first, and whose fault it is.

The public names are resolved when they are first used, so that the sidecar, which needs none of them,
starts without importing FastAPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi_headroom.probes.cache import cache_invalidated, cache_result
    from fastapi_headroom.probes.pool_autosize import Autosize, autosize
    from fastapi_headroom.wiring import Handle, init, init_worker

__all__ = ["Autosize", "Handle", "autosize", "cache_invalidated", "cache_result", "init", "init_worker"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastapi_headroom import wiring
    from fastapi_headroom.probes import cache, pool_autosize

    rooms = {"cache_result": cache, "cache_invalidated": cache, "Autosize": pool_autosize, "autosize": pool_autosize}
    value = getattr(rooms.get(name, wiring), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
