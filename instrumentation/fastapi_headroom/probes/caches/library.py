"""How caches of other libraries report: their methods are wrapped, and what they answered goes where redis-py's goes.

So a memcached has everything that a Redis has: key patterns, ages, stampedes, latency, payload, errors, and the
``cache`` stage of the request.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from time import perf_counter
from types import FrameType
from typing import Any, ClassVar, Final, Protocol

from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE, Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.cache_commands import Command, command_of
from fastapi_headroom.probes.cache_effects import size_of
from fastapi_headroom.probes.cache_series import CacheSeries
from fastapi_headroom.probes.patches import Patches


def _known(word: str) -> Command:
    command = command_of(word)
    assert command is not None
    return command


GET: Final = _known("GET")
MGET: Final = _known("MGET")


class Answer:
    """What one call was answered, and the series that it goes to."""

    __slots__ = ("now", "request", "result", "series")

    def __init__(self, series: CacheSeries, result: Any, now: float, request: Ledger | None) -> None:
        self.series, self.result, self.now, self.request = series, result, now, request

    def looked_up(self, key: Any, reply: Any) -> None:
        """Count a look-up of one key; ``reply`` is None for a miss."""
        self.series.judge(GET, ("GET", key), reply, self.now, self.request)

    def looked_up_all(self, keys: Collection[Any], replies: Iterable[Any]) -> None:
        """Count a look-up of several keys; what is None in ``replies`` is a miss."""
        if keys:
            self.series.judge(MGET, ("MGET", *keys), list(replies), self.now, self.request)

    def counted(self, key: Any, found: bool) -> None:
        """Count a look-up in a cache inside the process."""
        results = self.series.patterns.look_up(key)
        if results is not None:
            (results.hit if found else results.miss).inc()

    def wrote(self, key: Any, value: Any, seconds: float) -> None:
        """Take note of an entry that was written, to live for so many seconds. What is sent as it is has a size."""
        self.series.wrote(key, seconds, self.now, self.request)
        if type(value) is bytes or type(value) is str:
            self.series.wrote_bytes(size_of(value))


@dataclass(frozen=True, slots=True)
class Method:
    """What a wrapped method does. ``tell`` is called with the answer and the method's own arguments."""

    word: str
    """The command of Redis that it is like: under its name it is timed."""
    tell: Callable[..., None]
    keys: Callable[..., Collection[Any]] | None = None
    """Returns what is looked up, from the method's own arguments; None for what is no look-up."""


class Library(Protocol):
    """One library whose caches are measured."""

    module: ClassVar[str]
    """What the app has imported when it uses the library."""

    def attach(self, recorder: Recorder, patches: Patches) -> None:
        """Wrap the library's classes."""

    def owns(self, thing: Any) -> bool:
        """Return whether something is a cache or a client of this library. Asked when it has been imported."""


class Recorder:
    """What wraps call. Never raises into the app."""

    def __init__(self, probe: CacheProbe) -> None:
        self.probe = probe
        self.names: dict[int, tuple[str, Any]] = {}
        """Names of the user's choice, by the identity of what is named, which is kept so that it stays the same."""

    def client(self, patches: Patches, owner: Any, address: Callable[[Any], str], methods: dict[str, Method]) -> None:
        """Wrap synchronous methods of a client; those that a version does not have are left out."""
        for name, method in methods.items():
            if name in vars(owner):
                patches.wrap(owner, name, partial(self._wrap, method=method, address=address))

    def async_client(
        self, patches: Patches, owner: Any, address: Callable[[Any], str], methods: dict[str, Method]
    ) -> None:
        """Wrap methods of a client that are awaited."""
        for name, method in methods.items():
            if name in vars(owner):
                patches.wrap(owner, name, partial(self._wrap_async, method=method, address=address))

    def local(
        self,
        patches: Patches,
        owner: Any,
        default: str,
        methods: dict[str, Callable[..., None]],
        skip: Callable[[Any, FrameType], bool] | None = None,
    ) -> None:
        """Wrap methods of a cache inside the process: look-ups are counted and nothing is timed.

        ``skip`` says of a cache and the frame that asks it whether that is no look-up, but the library's own doing.
        """
        for name, tell in methods.items():
            if name in vars(owner):
                patches.wrap(owner, name, partial(self._wrap_local, tell=tell, default=default, skip=skip))

    def _wrap(self, original: Any, method: Method, address: Callable[[Any], str]) -> Any:
        current, now, command = ledger.current.get, perf_counter, _known(method.word)

        @wraps(original)
        def call(client: Any, *args: Any, **kwargs: Any) -> Any:
            if self.probe.writer is None:
                return original(client, *args, **kwargs)
            request = current()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = now()
            try:
                result = original(client, *args, **kwargs)
            except Exception as error:
                self._failed(address, client, command, method, error, now() - started, args, kwargs)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            ended = now()
            self._done(address, client, command, method, result, ended - started, ended, request, args, kwargs)
            return result

        return call

    def _wrap_async(self, original: Any, method: Method, address: Callable[[Any], str]) -> Any:
        current, now, command = ledger.current.get, perf_counter, _known(method.word)

        @wraps(original)
        async def call(client: Any, *args: Any, **kwargs: Any) -> Any:
            if self.probe.writer is None:
                return await original(client, *args, **kwargs)
            request = current()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = now()
            try:
                result = await original(client, *args, **kwargs)
            except Exception as error:
                self._failed(address, client, command, method, error, now() - started, args, kwargs)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            ended = now()
            self._done(address, client, command, method, result, ended - started, ended, request, args, kwargs)
            return result

        return call

    def _wrap_local(
        self,
        original: Callable[..., Awaitable[Any]],
        tell: Callable[..., None],
        default: str,
        skip: Callable[[Any, FrameType], bool] | None,
    ) -> Any:
        @wraps(original)
        async def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
            result = await original(cache, *args, **kwargs)
            if self.probe.writer is not None:
                try:
                    if skip is not None and skip(cache, sys._getframe(1)):
                        return result
                    series = self.probe.series_named(self._name(cache) or default)
                    tell(Answer(series, result, 0.0, None), *args, **kwargs)
                except Exception as failure:
                    self.probe.hide(failure)
            return result

        return call

    def _done(
        self,
        address: Callable[[Any], str],
        client: Any,
        command: Command,
        method: Method,
        result: Any,
        seconds: float,
        now: float,
        request: Ledger | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        try:
            series = self.probe.series_named(self._name(client) or address(client)).connected()
            series.observe(command, seconds)
            method.tell(Answer(series, result, now, request), *args, **kwargs)
        except Exception as failure:
            self.probe.hide(failure)

    def _failed(
        self,
        address: Callable[[Any], str],
        client: Any,
        command: Command,
        method: Method,
        error: Exception,
        seconds: float,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        try:
            series = self.probe.series_named(self._name(client) or address(client)).connected()
            series.observe(command, seconds)
            if method.keys is not None:
                series.count_errors(MGET, ("MGET", *method.keys(*args, **kwargs)))
            if isinstance(error, TimeoutError):
                series.count_timeout()
        except Exception as failure:
            self.probe.hide(failure)

    def _name(self, thing: Any) -> str:
        named = self.names.get(id(thing))
        return named[0] if named is not None else ""
