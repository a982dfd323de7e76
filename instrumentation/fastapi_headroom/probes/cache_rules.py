"""Which Redis commands are cache operations, and how a reply tells a hit from a miss.

Commands fall into four groups:

* look-ups (``LOOKUPS``): timed, and their replies judged;
* other commands of a cache, locks and counters (``TIMED``): timed under their own name;
* commands of queues, streams, publish/subscribe and the connection (``SKIPPED``): not looked at, so that a broker
  in the same process (Celery, RQ, arq) changes neither hit ratio nor latency;
* anything else: timed as ``other``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

Verdicts = Iterable[tuple[Any, bool]]
"""Pairs of a key and whether it was there."""
Judge = Callable[[Sequence[Any], Any], Verdicts]
"""Takes the command with its arguments and the reply."""


def one(args: Sequence[Any], reply: Any) -> Verdicts:
    """A hit if there is a reply: GET, HGET and their like return nil for what is not there."""
    return ((args[1], reply is not None),)


def _filled(args: Sequence[Any], reply: Any) -> Verdicts:
    """A hit if the reply is not empty: a hash, set or list that is not there looks like an empty one."""
    return ((args[1], bool(reply)),)


def _each_key(args: Sequence[Any], reply: Any) -> Verdicts:
    """One look-up per key: MGET."""
    return ((key, value is not None) for key, value in zip(args[1:], reply, strict=False))


def _each_field(args: Sequence[Any], reply: Any) -> Verdicts:
    """One look-up per field, as many HGETs would count: HMGET."""
    return ((args[1], value is not None) for value in reply)


def _counted(args: Sequence[Any], reply: Any) -> Verdicts:
    """One look-up per key: EXISTS tells how many are there but not which, so the first ones count as hits."""
    return ((key, index < int(reply)) for index, key in enumerate(args[1:]))


LOOKUPS: Final[dict[str, Judge]] = {
    **dict.fromkeys(("GET", "GETEX", "GETDEL", "HGET", "JSON.GET", "ZSCORE", "DUMP"), one),
    **dict.fromkeys(
        ("HGETALL", "HVALS", "HKEYS", "SMEMBERS", "LRANGE", "ZRANGE", "ZREVRANGE", "ZRANGEBYSCORE", "GETRANGE"), _filled
    ),
    **dict.fromkeys(("HEXISTS", "SISMEMBER"), _filled),
    "MGET": _each_key,
    "HMGET": _each_field,
    "EXISTS": _counted,
}
TIMED: Final = frozenset({
    "SET", "SETEX", "PSETEX", "SETNX", "MSET", "GETSET", "APPEND", "DEL", "UNLINK", "EXPIRE", "PEXPIRE", "EXPIREAT",
    "PERSIST", "TTL", "PTTL", "TOUCH", "TYPE", "INCR", "INCRBY", "INCRBYFLOAT", "DECR", "DECRBY", "HSET", "HSETNX",
    "HMSET", "HDEL", "HINCRBY", "HLEN", "SADD", "SREM", "SCARD", "ZADD", "ZREM", "ZCARD", "ZINCRBY", "ZREMRANGEBYSCORE",
    "EVAL", "EVALSHA", "FCALL", "JSON.SET", "JSON.DEL", "SCAN", "PFADD", "PFCOUNT", "SETBIT", "GETBIT",
})  # fmt: skip
SKIPPED: Final = frozenset({
    "LPUSH", "RPUSH", "LPUSHX", "RPUSHX", "LPOP", "RPOP", "LLEN", "LREM", "LTRIM", "LMOVE", "RPOPLPUSH", "LMPOP",
    "BLPOP", "BRPOP", "BLMOVE", "BRPOPLPUSH", "BLMPOP", "BZPOPMIN", "BZPOPMAX", "BZMPOP", "ZPOPMIN", "ZPOPMAX",
    "XADD", "XREAD", "XREADGROUP", "XACK", "XDEL", "XTRIM", "XLEN", "XRANGE", "XREVRANGE", "XPENDING", "XCLAIM",
    "XAUTOCLAIM", "XGROUP CREATE", "XINFO STREAM", "XINFO GROUPS", "XINFO CONSUMERS",
    "PUBLISH", "SPUBLISH", "SUBSCRIBE", "PSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "MONITOR",
    "WAIT", "PING", "ECHO", "AUTH", "HELLO", "SELECT", "QUIT", "INFO", "DBSIZE", "TIME", "WATCH", "UNWATCH", "MULTI",
    "EXEC", "DISCARD", "CLIENT SETINFO", "CLIENT SETNAME", "CLIENT ID", "CLIENT LIST", "CONFIG GET", "CONFIG SET",
    "SCRIPT LOAD", "SCRIPT EXISTS", "COMMAND", "CLUSTER SLOTS", "CLUSTER SHARDS", "ROLE", "FLUSHDB", "FLUSHALL",
})  # fmt: skip
BROKER_KEYS: Final = ("celery-task-meta-", "_kombu.", "unacked", "rq:", "arq:", "dramatiq:")
"""Beginnings of keys with which task queues keep their own books: timed, but no cache look-ups."""


def of_broker(key: Any) -> bool:
    """Return whether a task queue owns this key."""
    if isinstance(key, bytes):
        key = key[:32].decode("ascii", "replace")
    return isinstance(key, str) and key.startswith(BROKER_KEYS)


def keys_of(operation: str, args: Sequence[Any]) -> Sequence[Any]:
    """Return the keys that a look-up asks for: one entry per look-up that it would count."""
    if operation in ("mget", "exists"):
        return args[1:]
    if operation == "hmget":
        return (args[1],) * (len(args) - 2)
    return args[1:2]
