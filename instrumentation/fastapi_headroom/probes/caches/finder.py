"""Finds the caches of the app's own modules: in their globals, and in the classes that they define.

Each module is looked at once, when it has been imported. Libraries' caches are not the app's and stay out, and so do
functions of ``functools.lru_cache`` that take no argument: they hold one object for good, such as the settings, and
each call is a hit. ``init(app, caches={"name": function})`` measures one of them all the same.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any, Final

from fastapi_headroom.probes.blame import owner_of
from fastapi_headroom.probes.caches.cachetools import held_by, is_cache

LruCache: Final[type[Any]] = type(functools.lru_cache(lambda: None))
_DEPTH: Final = 4
"""Decorators that may lie over a cached function."""


class Finder:
    """Remembers which modules were looked at."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._modules = 0

    def look(self) -> list[tuple[str, Any]]:
        """Return name and object of what was imported since the last look, functions before caches.

        Names are ``module.function`` and ``module.variable``.
        """
        if len(sys.modules) == self._modules:
            return []
        found: list[tuple[str, Any]] = []
        self._modules = len(sys.modules)
        for name, module in sorted(_own(sys.modules.copy(), self._seen)):
            if type(module).__name__ == "_LazyModule" or getattr(
                _globals(module).get("__spec__"), "_initializing", False
            ):
                self._modules = 0  # look again when it has been loaded
                continue
            self._seen.add(name)
            found += _caches_of(name, module)
        # A function that is decorated with a cache says more than the variable that its cache lies in.
        return sorted(found, key=lambda pair: is_cache(pair[1]))


def is_cached(thing: Any) -> bool:
    """Return whether something is a function of ``functools.lru_cache``, or decorated by cachetools."""
    return type(thing) is LruCache or held_by(thing) is not None


def _globals(module: ModuleType) -> dict[str, Any]:
    """Return a module's globals without asking the module: a lazy one would load itself."""
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found


def _own(modules: dict[str, Any], seen: set[str]) -> Iterator[tuple[str, ModuleType]]:
    for name, module in modules.items():
        if name in seen or not issubclass(type(module), ModuleType):
            continue
        file = _globals(module).get("__file__")
        if isinstance(file, str) and owner_of(file) == "user":
            yield name, module
        else:
            seen.add(name)


def _caches_of(name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    for variable, value in list(_globals(module).items()):
        if issubclass(type(value), type):  # by their types: a proxy is not asked what it stands for
            if value.__module__ == name:
                for attribute, member in list(vars(value).items()):
                    cached = _unwrapped(member)
                    if cached is not None and not _holds_one(cached):
                        yield f"{name}.{value.__qualname__}.{attribute}", cached
        elif is_cache(value):
            yield f"{name}.{variable}", value
        else:
            cached = _unwrapped(value)
            if cached is not None and not _imported(cached, name) and not _holds_one(cached):
                yield f"{name}.{variable}", cached


def _unwrapped(value: Any) -> Any:
    """Return the cached function that lies under decorators; None if there is none."""
    if type(value) in (staticmethod, classmethod):
        value = value.__func__
    for _ in range(_DEPTH):
        if is_cached(value):
            return value
        value = value.__dict__.get("__wrapped__") if type(value) is FunctionType else None
        if value is None:
            break
    return None


def _holds_one(cached: Any) -> bool:
    """Return whether a function of ``functools.lru_cache`` takes no argument: a singleton, and no cache."""
    if type(cached) is not LruCache:
        return False
    try:
        return not inspect.signature(cached.__wrapped__).parameters
    except (TypeError, ValueError):  # written in C, and without a signature
        return False


def _imported(cached: Any, module: str) -> bool:
    """Return whether a function was made in another module, which has it under its own name."""
    home = getattr(cached, "__module__", module)
    if home == module:
        return False
    there: Any = sys.modules.get(home)
    return issubclass(type(there), ModuleType) and any(it is cached for it in list(_globals(there).values()))
