"""How a reply of Redis tells a hit from a miss, and which commands are look-ups at all.

Every command belongs to one of four groups:

* look-ups (``LOOKUPS``): timed, and their replies judged;
* other commands of a cache, writes, locks and counters among them (``TIMED``): timed under their own name. Their
  replies judge nothing: 0 is a proper answer of SCARD or GETBIT, and only its author knows what a script returns;
* commands of queues, streams, publish/subscribe, the connection and the server (``SKIPPED``, ``SKIPPED_FAMILIES``):
  not looked at, so that a broker in the same process (Celery, RQ, arq) changes neither hit ratio nor latency;
* anything else: timed as ``other``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

Arguments = Sequence[Any]
"""A command with its arguments."""


class Rule(NamedTuple):
    """How one command is judged: one verdict for each key that it asks for."""

    keys: Callable[[Arguments], Sequence[Any]]
    """Takes the command, returns the keys asked for, one for each look-up that it counts as."""
    found: Callable[[Arguments, Any], Iterable[bool]]
    """Takes the command and the reply, returns for each of these keys whether it was there."""
    sized: bool = True
    """Whether the reply's size is that of what was sent: documents and numbers are no longer."""


def _first(args: Arguments) -> Sequence[Any]:
    return args[1:2]


def _second(args: Arguments) -> Sequence[Any]:
    return args[2:3]


def _all(args: Arguments) -> Sequence[Any]:
    return args[1:]


def _all_but_the_path(args: Arguments) -> Sequence[Any]:
    return args[1:-1]


def _once_per_field(args: Arguments) -> Sequence[Any]:
    return (args[1],) * (len(args) - 2)


def _once_per_named_field(args: Arguments) -> Sequence[Any]:
    words = [word.upper() if isinstance(word, str) else word for word in args]
    place = words.index("FIELDS") if "FIELDS" in words else words.index(b"FIELDS")
    return (args[1],) * int(args[place + 1])


def _not_nil(args: Arguments, reply: Any) -> Iterable[bool]:
    return (reply is not None,)


def _not_empty(args: Arguments, reply: Any) -> Iterable[bool]:
    return (bool(reply),)


def _any_position(args: Arguments, reply: Any) -> Iterable[bool]:
    return (reply is not None and reply != [],)


def _each_not_nil(args: Arguments, reply: Any) -> Iterable[bool]:
    return (value is not None for value in reply)


def _each_not_empty(args: Arguments, reply: Any) -> Iterable[bool]:
    return map(bool, reply)


def _counted(args: Arguments, reply: Any) -> Iterable[bool]:
    return (index < int(reply) for index in range(len(args) - 1))


def _document(args: Arguments, reply: Any) -> Iterable[bool]:
    """A JSONPath that matches nothing is answered by an empty array; an old path to an empty array too, rightly."""
    if any(str(path).startswith("$") for path in args[2:]):
        return (bool(reply),)
    return (reply is not None,)


def _document_part(args: Arguments, reply: Any) -> Iterable[bool]:
    if isinstance(reply, list) and any(str(path).startswith("$") for path in args[2:]):
        return (any(part is not None and part != [None] for part in reply),)
    return (reply is not None,)


ONE: Final = Rule(_first, _not_nil)
"""A hit unless the reply is nil: GET, HGET and their like."""
FILLED: Final = Rule(_first, _not_empty)
"""A hit unless the reply is empty: a hash, set, list or string that is not there looks like an empty one."""
NOT_ZERO: Final = Rule(_first, _not_empty, sized=False)
"""A hit unless the reply is 0: STRLEN of what is not there, SISMEMBER."""
FILLED_OF_MANY: Final = Rule(_second, _not_empty)
"""The same for commands that begin with the number of keys; one look-up, of the first key."""
EACH_KEY: Final = Rule(_all, _each_not_nil)
"""One look-up per key: MGET."""
EACH_FIELD: Final = Rule(_once_per_field, _each_not_nil)
"""One look-up per field or member, as many HGETs would count: HMGET, ZMSCORE."""
EACH_MEMBER: Final = Rule(_once_per_field, _each_not_empty, sized=False)
"""The same where 0 or an empty string says that it is not there: SMISMEMBER, GEOHASH."""
EACH_NAMED_FIELD: Final = Rule(_once_per_named_field, _each_not_nil)
"""One look-up per field behind FIELDS: HGETEX, HGETDEL."""
COUNTED: Final = Rule(_all, _counted, sized=False)
"""One look-up per key: EXISTS tells how many are there but not which, so the first ones count as hits."""
POSITION: Final = Rule(_first, _any_position)
"""A hit unless nothing was found; position 0 is a hit: LPOS."""

LOOKUPS: Final[dict[str, Rule]] = {
    **dict.fromkeys(
        ("GET", "GETEX", "GETDEL", "HGET", "LINDEX", "ZSCORE", "ZRANK", "ZREVRANK", "GEODIST", "DUMP", "DIGEST"), ONE
    ),
    **dict.fromkeys(("STRLEN", "HSTRLEN", "HEXISTS", "SISMEMBER"), NOT_ZERO),
    **dict.fromkeys(("GETRANGE", "SUBSTR", "HGETALL", "HKEYS", "HVALS", "HRANDFIELD", "LRANGE", "SORT_RO"), FILLED),
    **dict.fromkeys(("SMEMBERS", "SRANDMEMBER", "SINTER", "SUNION", "SDIFF"), FILLED),
    **dict.fromkeys(
        (
            "ZRANGE", "ZREVRANGE", "ZRANGEBYSCORE", "ZREVRANGEBYSCORE", "ZRANGEBYLEX", "ZREVRANGEBYLEX", "ZRANDMEMBER",
        ),
        FILLED,
    ),
    **dict.fromkeys(("GEOSEARCH", "GEORADIUS_RO", "GEORADIUSBYMEMBER_RO"), FILLED),
    **dict.fromkeys(("ZINTER", "ZUNION", "ZDIFF"), FILLED_OF_MANY),
    **dict.fromkeys(("HMGET", "ZMSCORE", "GEOPOS"), EACH_FIELD),
    **dict.fromkeys(("SMISMEMBER", "GEOHASH"), EACH_MEMBER),
    **dict.fromkeys(("HGETEX", "HGETDEL"), EACH_NAMED_FIELD),
    **dict.fromkeys(
        ("JSON.TYPE", "JSON.STRLEN", "JSON.ARRLEN", "JSON.OBJLEN", "JSON.OBJKEYS", "JSON.RESP"),
        Rule(_first, _document_part, sized=False),
    ),
    "MGET": EACH_KEY,
    "EXISTS": COUNTED,
    "LPOS": POSITION,
    "JSON.GET": Rule(_first, _document, sized=False),
    "JSON.MGET": Rule(_all_but_the_path, _each_not_nil, sized=False),
}  # fmt: skip
TIMED: Final = frozenset({
    "SET", "SETEX", "PSETEX", "SETNX", "MSET", "MSETNX", "MSETEX", "GETSET", "APPEND", "SETRANGE", "LCS", "STRALGO",
    "DEL", "DELEX", "UNLINK", "COPY", "RENAME", "RENAMENX", "RESTORE", "MOVE", "SORT", "KEYS", "RANDOMKEY",
    "OBJECT", "DEBUG", "EXPIRE", "PEXPIRE", "EXPIREAT", "PEXPIREAT", "PERSIST", "TTL", "PTTL", "EXPIRETIME",
    "PEXPIRETIME", "TOUCH", "TYPE", "INCR", "INCRBY", "INCRBYFLOAT", "INCREX", "DECR", "DECRBY", "HSET", "HSETNX",
    "HSETEX", "HMSET", "HDEL", "HINCRBY", "HINCRBYFLOAT", "HLEN", "HEXPIRE", "HPEXPIRE", "HTTL", "HPTTL",
    "HPERSIST", "HEXPIREAT", "HPEXPIREAT", "HEXPIRETIME", "HPEXPIRETIME", "HSCAN", "LSET", "LINSERT", "SADD",
    "SREM", "SCARD", "SMOVE", "SPOP", "SSCAN", "SINTERCARD", "SUNIONCARD", "SDIFFCARD", "SINTERSTORE",
    "SUNIONSTORE", "SDIFFSTORE", "ZADD", "ZREM", "ZCARD", "ZCOUNT", "ZLEXCOUNT", "ZINCRBY", "ZREMRANGEBYSCORE",
    "ZREMRANGEBYRANK", "ZREMRANGEBYLEX", "ZSCAN", "ZINTERCARD", "ZINTERSTORE", "ZUNIONSTORE", "ZDIFFSTORE",
    "ZRANGESTORE", "GEOADD", "GEORADIUS", "GEORADIUSBYMEMBER", "GEOSEARCHSTORE", "EVAL", "EVALSHA", "EVAL_RO",
    "EVALSHA_RO", "FCALL", "FCALL_RO", "SCAN", "PFADD", "PFCOUNT", "PFMERGE", "SETBIT", "GETBIT", "BITCOUNT",
    "BITOP", "BITPOS", "BITFIELD", "BITFIELD_RO", "JSON.SET", "JSON.MSET", "JSON.MERGE", "JSON.DEL", "JSON.CLEAR",
    "JSON.NUMINCRBY", "JSON.NUMMULTBY", "JSON.NUMPOWBY", "JSON.DEBUG", "JSON.ARRAPPEND", "JSON.ARRINDEX",
    "JSON.ARRINSERT", "JSON.ARRPOP", "JSON.ARRTRIM", "JSON.STRAPPEND", "JSON.TOGGLE",
})  # fmt: skip
SKIPPED: Final = frozenset({
    "LPUSH", "RPUSH", "LPUSHX", "RPUSHX", "LPOP", "RPOP", "LLEN", "LREM", "LTRIM", "LMOVE", "LMOVEM", "RPOPLPUSH",
    "LMPOP", "BLPOP", "BRPOP", "BLMOVE", "BLMOVEM", "BRPOPLPUSH", "BLMPOP", "BZPOPMIN", "BZPOPMAX", "BZMPOP",
    "ZPOPMIN", "ZPOPMAX", "ZMPOP", "XADD", "XREAD", "XREADGROUP", "XACK", "XACKDEL", "XNACK", "XDEL", "XDELEX",
    "XTRIM", "XLEN", "XRANGE", "XREVRANGE", "XPENDING", "XCLAIM", "XAUTOCLAIM", "XSETID", "XCFGSET", "PUBLISH",
    "SPUBLISH", "SUBSCRIBE", "PSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE", "WATCH",
    "UNWATCH", "MULTI", "EXEC", "DISCARD", "WAIT", "WAITAOF", "PING", "ECHO", "AUTH", "HELLO", "SELECT", "QUIT",
    "RESET", "READONLY", "READWRITE", "ASKING", "INFO", "DBSIZE", "TIME", "ROLE", "FLUSHDB", "FLUSHALL", "SWAPDB",
    "LASTSAVE", "SAVE", "BGSAVE", "BGREWRITEAOF", "MONITOR", "SHUTDOWN", "REPLICAOF", "SLAVEOF", "FAILOVER", "SYNC",
    "PSYNC", "MIGRATE",
})  # fmt: skip
SKIPPED_FAMILIES: Final = frozenset({
    "ACL", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "FUNCTION", "HOTKEYS", "LATENCY", "MEMORY", "LOLWUT", "MODULE",
    "PUBSUB", "SCRIPT", "SENTINEL", "SLOWLOG", "XGROUP", "XINFO",
})  # fmt: skip
"""First words of commands that have two: ``CONFIG GET``."""
BROKER_KEYS: Final = ("celery-task-meta-", "_kombu.", "unacked", "rq:", "arq:", "dramatiq:")
"""Beginnings of keys with which task queues keep their own books: timed, but no cache look-ups."""


def of_broker(key: Any) -> bool:
    """Return whether a task queue owns this key."""
    if isinstance(key, str):
        return key.startswith(BROKER_KEYS)
    return isinstance(key, bytes) and key.startswith(_BROKER_KEYS_IN_BYTES)


_BROKER_KEYS_IN_BYTES: Final = tuple(beginning.encode() for beginning in BROKER_KEYS)
