"""cachetools' caches count nothing, so one that is measured gets a class of its own that does.

The class is derived from the cache's, has its name, and is taken back in the end; caches that are not measured pay
nothing. Look-ups are ``cache[key]`` and ``cache.get(key)``, which is what the decorators do too; ``in``, ``pop`` and
``setdefault`` are none. Whatever else reads entries one by one, such as ``items()``, counts as well.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final
from weakref import ref

from fastapi_headroom.probes.caches.source import Reading

_NOTHING: Final = object()


class Tally:
    """What one cache was asked. Its users hold a lock around it, or are one thread: cachetools demands that."""

    __slots__ = ("evictions", "lookups", "misses")

    def __init__(self) -> None:
        self.lookups = self.misses = self.evictions = 0


class CountedCache:
    """A ``cachetools.Cache`` whose class counts."""

    def __init__(self, cache: Any) -> None:
        """Begin to count. Raises TypeError for a class that cannot be derived from, or a layout that differs."""
        self._plain: type[Any] = cache.__class__
        self._tally = Tally()
        self._counting = _counting(self._plain, self._tally)
        self._cache = ref(cache)
        cache.__class__ = self._counting

    def read(self) -> Reading | None:
        """Return what was counted. Entries that have expired and still lie there are entries: they hold memory."""
        cache = self._cache()
        if cache is None:
            return None
        # The properties of timed caches throw out what has expired: that is for the thread of their user, not for ours.
        base = sys.modules["cachetools"].Cache
        limit = base.maxsize.fget(cache)
        tally = self._tally
        return Reading(
            tally.lookups - tally.misses,
            tally.misses,
            base.currsize.fget(cache),
            None if limit == math.inf else limit,
            tally.evictions,
        )

    def release(self) -> None:
        """Give the cache its class back, unless somebody else has given it another one."""
        cache = self._cache()
        if cache is not None and type(cache) is self._counting:
            cache.__class__ = self._plain


def is_cache(thing: Any) -> bool:
    """Return whether something is a cache of cachetools. By its type: a proxy is not asked what it stands for."""
    base = getattr(sys.modules.get("cachetools"), "Cache", None)
    return isinstance(base, type) and issubclass(type(thing), base)


def held_by(decorated: Any) -> Any:
    """Return the cache behind a decorated function: a ``Cache``, or a dict where ``info=True`` lets it tell its counts.

    None for what is no such function, or one over a plain dict: that cannot be made to count.
    """
    kind = type(decorated)
    if "cachetools" not in sys.modules or not (
        kind is FunctionType or kind.__module__.partition(".")[0] == "cachetools"
    ):
        return None
    attributes = getattr(decorated, "__dict__", {})
    held = attributes.get("cache")
    if is_cache(held) or (isinstance(held, dict) and callable(getattr(decorated, "cache_info", None))):
        return held
    return None


def _counting(plain: type[Any], tally: Tally) -> type[Any]:
    """Return a subclass of ``plain`` that counts into ``tally``."""
    get_item, get, missing, pop_item = plain.__getitem__, plain.get, plain.__missing__, plain.popitem
    reduce: Callable[..., Any] = plain.__reduce_ex__

    def __getitem__(self: Any, key: Any) -> Any:  # noqa: N807 (methods of a class that is made below)
        tally.lookups += 1
        return get_item(self, key)

    def __missing__(self: Any, key: Any) -> Any:  # noqa: N807
        tally.misses += 1
        return missing(self, key)

    def counted_get(self: Any, key: Any, default: Any = None) -> Any:
        value = get(self, key, _NOTHING)
        if value is _NOTHING:
            tally.lookups += 1
            tally.misses += 1
            return default
        return value

    def popitem(self: Any) -> Any:
        lookups = tally.lookups
        item = pop_item(self)
        tally.lookups = lookups
        tally.evictions += 1
        return item

    def quietly(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = tally.lookups, tally.misses
            try:
                return method(self, *args, **kwargs)
            finally:
                tally.lookups, tally.misses = before

        return call

    def clear(self: Any) -> None:
        evictions = tally.evictions
        plain.clear(self)
        tally.evictions = evictions

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        # A copy, pickled or not, is of the plain class: this one cannot be found by its name. Protocol 1 is the newest
        # in which a pickle may be of another class than the object.
        function, arguments, *rest = reduce(self, 1)
        return function, tuple(plain if it is counting else it for it in arguments), *rest

    metaclass: Any = type(plain)
    counting: type[Any] = metaclass(
        plain.__name__,
        (plain,),
        {
            "__slots__": (),
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "__getitem__": __getitem__,
            "__missing__": __missing__,
            "__reduce_ex__": __reduce_ex__,
            "get": counted_get,
            "pop": quietly(plain.pop),
            "popitem": popitem,
            "setdefault": quietly(plain.setdefault),
            "clear": clear,
        },
    )
    return counting
