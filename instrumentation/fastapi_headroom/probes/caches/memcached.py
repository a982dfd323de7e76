"""memcached by its clients pymemcache (also pooled, hashed and retrying ones) and aiomcache.

Every look-up and every write of entries is measured, ``set`` with its time to live. A client that is told to swallow
errors (``ignore_exc``) answers as if the key were not there, and so it is a miss here as well.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Final

from fastapi_headroom.probes.cache_ages import UNKNOWN
from fastapi_headroom.probes.caches.library import Answer, Method, Recorder
from fastapi_headroom.probes.patches import Patches

PORT: Final = 11211
_MONTH: Final = 60 * 60 * 24 * 30
"""Longer times to live are taken for moments since 1970."""


class Pymemcache:
    """pymemcache: every kind of client calls one that talks to one server."""

    module: ClassVar[str] = "pymemcache.client.base"

    def attach(self, recorder: Recorder, patches: Patches) -> None:
        """Wrap the client that talks to one server."""
        client = sys.modules[self.module].Client
        recorder.client(patches, client, _server_of_pymemcache, _PYMEMCACHE)

    def owns(self, thing: Any) -> bool:
        """Return whether something is a client of one server. The others make theirs as they need them."""
        return isinstance(thing, sys.modules[self.module].Client)


class Aiomcache:
    """aiomcache. Its clients' methods are awaited; keys and values are bytes."""

    module: ClassVar[str] = "aiomcache.client"

    def attach(self, recorder: Recorder, patches: Patches) -> None:
        """Wrap the client that the other one inherits from."""
        recorder.async_client(patches, sys.modules[self.module].FlagClient, _server_of_aiomcache, _AIOMCACHE)

    def owns(self, thing: Any) -> bool:
        """Return whether something is a client."""
        return isinstance(thing, sys.modules[self.module].FlagClient)


def _server_of_pymemcache(client: Any) -> str:
    server = client.server
    return f"{server[0]}:{server[1]}" if isinstance(server, tuple) else "unix"


def _server_of_aiomcache(client: Any) -> str:
    pool = client._pool
    return f"{getattr(pool, '_host', 'memcached')}:{getattr(pool, '_port', PORT)}"


def _seconds(expire: Any) -> float:
    return float(expire) if isinstance(expire, int | float) and 0 < expire <= _MONTH else UNKNOWN


def _got(answer: Answer, key: Any, default: Any = None) -> None:
    answer.looked_up(key, None if answer.result is default else answer.result)


def _got_with_token(answer: Answer, key: Any, default: Any = None, cas_default: Any = None) -> None:
    value = answer.result[0]
    answer.looked_up(key, None if value is default else value)


def _got_dict(answer: Answer, keys: Any) -> None:
    asked = keys if isinstance(keys, Collection) else list(answer.result)  # a generator has run out
    answer.looked_up_all(asked, [answer.result.get(key) for key in asked])


def _got_dict_with_tokens(answer: Answer, keys: Any) -> None:
    asked = keys if isinstance(keys, Collection) else list(answer.result)
    answer.looked_up_all(asked, [answer.result.get(key, (None,))[0] for key in asked])


def _got_tuple(answer: Answer, *keys: Any) -> None:
    answer.looked_up_all(keys, answer.result)


def _set(answer: Answer, key: Any, value: Any, expire: Any = 0, *_: Any, **__: Any) -> None:
    if answer.result:
        answer.wrote(key, value, _seconds(expire))


def _set_async(answer: Answer, key: Any, value: Any, exptime: Any = 0) -> None:
    if answer.result:
        answer.wrote(key, value, _seconds(exptime))


def _set_many(answer: Answer, values: Mapping[Any, Any], expire: Any = 0, *_: Any, **__: Any) -> None:
    failed = answer.result or ()
    for key, value in values.items():
        if key not in failed:
            answer.wrote(key, value, _seconds(expire))


def _nothing(answer: Answer, *_: Any, **__: Any) -> None:
    pass


def _one(key: Any, *_: Any, **__: Any) -> Collection[Any]:
    return (key,)


def _many(keys: Any) -> Collection[Any]:
    return keys if isinstance(keys, Collection) else ()


def _each(*keys: Any) -> Collection[Any]:
    return keys


_PYMEMCACHE: Final = {
    "get": Method("GET", _got, _one),
    "gets": Method("GET", _got_with_token, _one),
    "get_many": Method("MGET", _got_dict, _many),
    "get_multi": Method("MGET", _got_dict, _many),
    "gets_many": Method("MGET", _got_dict_with_tokens, _many),
    "set": Method("SET", _set),
    "add": Method("SETNX", _set),
    "replace": Method("SET", _set),
    "set_many": Method("MSET", _set_many),
    "set_multi": Method("MSET", _set_many),
    "delete": Method("DEL", _nothing),
    "delete_many": Method("DEL", _nothing),
    "delete_multi": Method("DEL", _nothing),
    "touch": Method("EXPIRE", _nothing),
    "incr": Method("INCRBY", _nothing),
    "decr": Method("DECRBY", _nothing),
}
_AIOMCACHE: Final = {
    "get": Method("GET", _got, _one),
    "gets": Method("GET", _got_with_token, _one),
    "multi_get": Method("MGET", _got_tuple, _each),
    "set": Method("SET", _set_async),
    "add": Method("SETNX", _set_async),
    "replace": Method("SET", _set_async),
    "delete": Method("DEL", _nothing),
    "touch": Method("EXPIRE", _nothing),
    "incr": Method("INCRBY", _nothing),
    "decr": Method("DECRBY", _nothing),
}
