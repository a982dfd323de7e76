"""Every read command of Redis against a real server: what is there is a hit, what is not is a miss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.client import NEVER_DECODE
from redis.commands import core
from redis.commands.json import commands as json_commands

from demo_app.stack.servers import Redis
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.cache_commands import COMMANDS, command_of
from fastapi_headroom.probes.cache_rules import LOOKUPS, SKIPPED, TIMED
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import operations, results

SETUP: tuple[tuple[Any, ...], ...] = (
    ("SET", "text:1", "value"), ("SET", "empty:1", ""), ("HSET", "hash:1", "a", "1", "b", "2"),
    ("SADD", "set:1", "a", "b"), ("SADD", "set:2", "b"), ("ZADD", "board:1", 0, "a", 1.5, "b"),
    ("RPUSH", "list:1", "a", "b"), ("GEOADD", "geo:1", 13.4, 52.5, "berlin", 2.3, 48.8, "paris"),
)  # fmt: skip
READS: tuple[tuple[tuple[Any, ...], int, int], ...] = (
    # the command, hits, misses
    (("GET", "text:1"), 1, 0), (("GET", "none:1"), 0, 1), (("GET", "empty:1"), 1, 0),
    (("get", "text:1"), 1, 0), ((b"GET", b"text:1"), 1, 0), (("Get", "text:1"), 1, 0),
    (("GETEX", "text:1"), 1, 0), (("GETEX", "none:1", "EX", 5), 0, 1), (("GETDEL", "none:1"), 0, 1),
    (("MGET", "text:1", "none:1", "text:1"), 2, 1), (("MGET", "none:1"), 0, 1),
    (("GETRANGE", "text:1", 0, 1), 1, 0), (("GETRANGE", "none:1", 0, 1), 0, 1), (("SUBSTR", "text:1", 0, 1), 1, 0),
    (("STRLEN", "text:1"), 1, 0), (("STRLEN", "none:1"), 0, 1), (("DUMP", "text:1"), 1, 0), (("DUMP", "none:1"), 0, 1),
    (("EXISTS", "text:1", "none:1", "hash:1"), 2, 1), (("EXISTS", "none:1"), 0, 1),
    (("HGET", "hash:1", "a"), 1, 0), (("HGET", "hash:1", "z"), 0, 1), (("HGET", "none:1", "a"), 0, 1),
    (("HMGET", "hash:1", "a", "z", "b"), 2, 1), (("HMGET", "none:1", "a"), 0, 1),
    (("HGETALL", "hash:1"), 1, 0), (("HGETALL", "none:1"), 0, 1), (("HKEYS", "hash:1"), 1, 0),
    (("HVALS", "none:1"), 0, 1), (("HEXISTS", "hash:1", "a"), 1, 0), (("HEXISTS", "hash:1", "z"), 0, 1),
    (("HSTRLEN", "hash:1", "a"), 1, 0), (("HSTRLEN", "hash:1", "z"), 0, 1),
    (("HRANDFIELD", "hash:1"), 1, 0), (("HRANDFIELD", "none:1"), 0, 1),
    (("HRANDFIELD", "hash:1", 2, "WITHVALUES"), 1, 0), (("HRANDFIELD", "none:1", 2), 0, 1),
    (("SMEMBERS", "set:1"), 1, 0), (("SMEMBERS", "none:1"), 0, 1), (("SISMEMBER", "set:1", "a"), 1, 0),
    (("SISMEMBER", "set:1", "z"), 0, 1), (("SMISMEMBER", "set:1", "a", "z", "b"), 2, 1),
    (("SMISMEMBER", "none:1", "a", "b"), 0, 2), (("SRANDMEMBER", "set:1"), 1, 0), (("SRANDMEMBER", "none:1"), 0, 1),
    (("SRANDMEMBER", "set:1", 2), 1, 0), (("SRANDMEMBER", "none:1", 2), 0, 1),
    (("SINTER", "set:1", "set:2"), 1, 0), (("SINTER", "none:1", "set:2"), 0, 1), (("SUNION", "set:1", "set:2"), 1, 0),
    (("SDIFF", "set:1", "set:2"), 1, 0), (("SDIFF", "set:2", "set:1"), 0, 1),
    (("ZSCORE", "board:1", "a"), 1, 0), (("ZSCORE", "board:1", "z"), 0, 1), (("ZRANK", "board:1", "a"), 1, 0),
    (("ZREVRANK", "board:1", "z"), 0, 1), (("ZMSCORE", "board:1", "a", "z"), 1, 1),
    (("ZRANGE", "board:1", 0, -1), 1, 0), (("ZRANGE", "none:1", 0, -1), 0, 1),
    (("ZREVRANGE", "board:1", 0, -1), 1, 0), (("ZRANGEBYSCORE", "board:1", 0, 1), 1, 0),
    (("ZREVRANGEBYSCORE", "board:1", 9, 8), 0, 1), (("ZRANGEBYLEX", "board:1", "-", "+"), 1, 0),
    (("ZREVRANGEBYLEX", "none:1", "+", "-"), 0, 1), (("ZRANDMEMBER", "board:1"), 1, 0),
    (("ZRANDMEMBER", "none:1"), 0, 1), (("ZINTER", 2, "board:1", "board:1"), 1, 0), (("ZUNION", 1, "none:1"), 0, 1),
    (("ZDIFF", 1, "board:1"), 1, 0),
    (("LRANGE", "list:1", 0, -1), 1, 0), (("LRANGE", "none:1", 0, -1), 0, 1), (("LINDEX", "list:1", 0), 1, 0),
    (("LINDEX", "list:1", 7), 0, 1), (("LPOS", "list:1", "a"), 1, 0), (("LPOS", "list:1", "z"), 0, 1),
    (("LPOS", "list:1", "a", "COUNT", 0), 1, 0), (("LPOS", "list:1", "z", "COUNT", 0), 0, 1),
    (("SORT_RO", "list:1", "ALPHA"), 1, 0), (("SORT_RO", "none:1"), 0, 1),
    (("GEOPOS", "geo:1", "berlin", "rome"), 1, 1), (("GEOHASH", "geo:1", "berlin", "rome"), 1, 1),
    (("GEODIST", "geo:1", "berlin", "paris"), 1, 0), (("GEODIST", "geo:1", "berlin", "rome"), 0, 1),
    (("GEOSEARCH", "geo:1", "FROMMEMBER", "berlin", "BYRADIUS", 1, "KM"), 1, 0),
    (("GEOSEARCH", "none:1", "FROMLONLAT", 1, 1, "BYRADIUS", 1, "KM"), 0, 1),
    (("GEORADIUS_RO", "geo:1", 13.4, 52.5, 1, "KM"), 1, 0),
    (("GEORADIUSBYMEMBER_RO", "geo:1", "berlin", 1, "KM"), 1, 0),
)  # fmt: skip
NO_LOOKUPS: tuple[tuple[Any, ...], ...] = (
    ("SCARD", "none:1"), ("ZCARD", "none:1"), ("ZCOUNT", "none:1", 0, 1), ("HLEN", "none:1"), ("TTL", "none:1"),
    ("TYPE", "none:1"), ("GETBIT", "none:1", 0), ("BITCOUNT", "none:1"), ("PFCOUNT", "none:1"), ("SSCAN", "none:1", 0),
    ("EVAL", "return redis.call('GET', KEYS[1])", 1, "none:1"), ("INCR", "count:1"), ("SET", "text:1", "value"),
)  # fmt: skip
ONLY_NEWER_SERVERS = {"HGETEX", "HGETDEL", "DIGEST"}


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def probe(writer: Writer) -> Iterator[CacheProbe]:
    probe = CacheProbe(load({}))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()


def expected(counted: dict[tuple[str, str], float]) -> tuple[float, float]:
    return (
        sum(number for (_, result), number in counted.items() if result == "hit"),
        sum(number for (_, result), number in counted.items() if result == "miss"),
    )


@pytest.mark.parametrize("decode", [False, True], ids=["bytes", "text"])
@pytest.mark.parametrize("protocol", [2, 3], ids=["RESP2", "RESP3"])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_each_read_by_its_reply(
    probe: CacheProbe, writer: Writer, redis_server: Redis, kind: str, protocol: int, decode: bool
) -> None:
    """Each read command counts the hits and misses that are true, and what is no look-up counts none."""
    options: dict[str, Any] = {"port": redis_server.port, "protocol": protocol, "decode_responses": decode, "db": 3}
    sync_client = redis.Redis(**options) if kind == "sync" else None
    async_client = redis.asyncio.Redis(**options) if kind == "async" else None
    probe.name_clients({"main": sync_client or async_client})

    async def run(*args: Any) -> Any:
        as_sent: dict[str, Any] = {NEVER_DECODE: []} if args[0] == "DUMP" else {}  # as redis-py's own dump() does
        if sync_client is not None:
            return sync_client.execute_command(*args, **as_sent)
        assert async_client is not None
        return await async_client.execute_command(*args, **as_sent)

    await run("FLUSHDB")
    for command in SETUP:
        await run(*command)
    before = (0.0, 0.0)
    for command, hits, misses in READS:
        await run(*command)
        after = expected(results(writer))
        assert (after[0] - before[0], after[1] - before[1]) == (hits, misses), command
        before = after
    for command in NO_LOOKUPS:
        await run(*command)
        assert expected(results(writer)) == before, command
    assert {pattern for pattern, _ in results(writer)} <= {
        f"{word}:{{}}" for word in ("text", "none", "empty", "hash", "set", "board", "list", "geo")
    }
    if sync_client is not None:
        sync_client.close()
    if async_client is not None:
        await async_client.aclose()


def test_each_read_is_proved() -> None:
    """Every look-up rule is proved above on a real server, save those that Debian's server does not know."""
    proved = {(word.decode() if isinstance(word, bytes) else word).upper() for (word, *_), _, _ in READS}
    assert set(LOOKUPS) - proved == ONLY_NEWER_SERVERS | {word for word in LOOKUPS if word.startswith("JSON.")}


@pytest.mark.parametrize(
    ("command", "reply", "verdicts"),
    [
        (("JSON.GET", "doc:1"), {"a": 1}, [True]),
        (("JSON.GET", "doc:1", "."), [], [True]),
        (("JSON.GET", "doc:1", "$.a"), [1], [True]),
        (("JSON.GET", "doc:1", "$.none"), [], [False]),
        (("JSON.GET", "none:1", "$"), None, [False]),
        (("JSON.MGET", "doc:1", "none:1", "$.a"), [[1], None], [True, False]),
        (("JSON.TYPE", "doc:1", "$.a"), [["integer"]], [True]),
        (("JSON.TYPE", "none:1", "$.a"), [None], [False]),
        (("JSON.TYPE", "none:1", "$.a"), [[None]], [False]),
        (("JSON.ARRLEN", "doc:1", "."), 0, [True]),
        (("JSON.ARRLEN", "doc:1", "$.none"), [], [False]),
        (("HGETEX", "hash:1", "EX", 5, "FIELDS", 2, "a", "z"), ["1", None], [True, False]),
        (("HGETDEL", "hash:1", b"FIELDS", 1, "a"), [b"1"], [True]),
        (("DIGEST", "text:1"), None, [False]),
    ],
)
def test_replies_of_newer_servers(command: tuple[Any, ...], reply: Any, verdicts: list[bool]) -> None:
    """Replies as redis-py documents them, of commands that the server here has not, are judged one by one."""
    rule = LOOKUPS[command[0]]
    assert list(rule.found(command, reply)) == verdicts
    assert len(rule.keys(command)) == len(verdicts)


def test_every_command_of_redis_py_has_a_group() -> None:
    """Whatever redis-py can send belongs to a group: nothing is timed as "other" by oversight."""
    sent = set()
    for module in (core, json_commands):
        sent |= set(re.findall(r"execute_command\(\s*\"([A-Z_. ]+)\"", inspect.getsource(module)))
    arrays = {word for word in sent if re.fullmatch(r"AR[A-Z]+", word)}  # a type of Redis 8.8: no cache's
    unknown = {word for word in sent - arrays if (command := command_of(word)) and command.name == "other"}
    assert sorted(unknown) == []
    assert not (set(LOOKUPS) & TIMED or set(LOOKUPS) & SKIPPED or TIMED & SKIPPED)


def test_a_command_is_known_however_it_is_written() -> None:
    """Upper and lower case, bytes and two words name the same command; commands of the server are left alone."""
    for form in ("MGET", "mget", b"MGET", b"mget"):
        assert COMMANDS[form] is COMMANDS["MGET"]
    assert command_of("mGet") is COMMANDS["MGET"]
    assert command_of("CONFIG GET") is command_of("config") is command_of(b"Client Setinfo") is None
    other = command_of("FT.SEARCH")
    assert other is not None
    assert other.name == "other"


def test_a_look_up_of_an_odd_key(probe: CacheProbe, writer: Writer, redis_server: Redis) -> None:
    """Keys that are numbers, bytearrays or memoryviews, as redis-py takes them, are looked up and folded."""
    with redis.Redis(port=redis_server.port, db=3) as client:
        probe.name_clients({"main": client})
        client.get(7)
        client.execute_command("GET", bytearray(b"odd:7"))
        client.mget([bytearray(b"odd:8"), memoryview(b"odd:9"), 3.5])
    assert sum(results(writer).values()) == 5
    assert operations(writer) == {"get": 2, "mget": 1}
    assert not any(character.isdigit() for pattern, _ in results(writer) for character in pattern)
