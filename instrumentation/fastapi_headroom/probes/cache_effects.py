"""What commands other than look-ups do to the entries of a cache: write them, age them, delete them.

From this the cache probe knows how old an entry is when it is served, when a fill ends, and how much is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView, Sequence, ValuesView
from time import time
from typing import Any, Final, Protocol

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache_ages import KEPT, UNKNOWN, Ages


class Entries(Protocol):
    """The entries of one cache."""

    ages: Ages

    def wrote(self, key: Any, seconds: float, now: float, request: Ledger | None) -> None:
        """An entry was written, with a time to live."""

    def wrote_bytes(self, number: int) -> None:
        """A command wrote so many bytes of values."""

    def left(self, key: Any, seconds: float, now: float) -> None:
        """The app was told that an entry has so many seconds left."""


Effect = Callable[[Entries, Sequence[Any], Any, float, "Ledger | None"], None]
"""Takes the entries, the command with its arguments, the reply, the time and the request."""


def size_of(value: Any) -> int:
    """Return the length of a value or of a reply's values: in bytes, or in characters where they are text."""
    kind = type(value)
    if kind is bytes or kind is str:
        return len(value)
    try:
        if isinstance(value, dict):
            return sum(map(_LENGTHS[type(next(iter(value), b""))], value)) + size_of(value.values())
        if isinstance(value, _CONTAINERS):
            # what is not there is None, and one look at the first value tells how they are measured
            values = list(filter(None, value))
            return sum(map(_LENGTHS[type(values[0])], values)) if values else 0
    except (KeyError, TypeError):  # of several kinds: one by one
        values = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return sum(map(size_of, values))
    if isinstance(value, bytearray | memoryview):
        return len(value)
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return len(str(value))


_LENGTHS: Final[dict[type, Callable[[Any], int]]] = {bytes: len, str: len}
_CONTAINERS: Final = (list, tuple, set, frozenset, KeysView, ValuesView)


def lifetime_of(options: Iterable[Any]) -> float:
    """Return the seconds to live that the options of SET, GETEX or HSETEX give; KEPT, or UNKNOWN for none."""
    words = iter(options)
    for word in words:
        text = word.decode("ascii", "replace") if isinstance(word, bytes) else word
        if not isinstance(text, str):
            continue
        text = text.upper()
        if text == "EX":
            return float(next(words))
        if text == "PX":
            return float(next(words)) / 1e3
        if text == "EXAT":
            return float(next(words)) - time()
        if text == "PXAT":
            return float(next(words)) / 1e3 - time()
        if text == "KEEPTTL":
            return KEPT
    return UNKNOWN


def _set(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    seconds = UNKNOWN
    if len(args) > 3:
        options = args[3:]
        if not reply and "GET" not in options:
            return  # NX or XX: not written
        seconds = lifetime_of(options)
    entries.wrote(args[1], seconds, now, request)
    entries.wrote_bytes(size_of(args[2]))


def _set_for(factor: float) -> Effect:
    def effect(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        entries.wrote(args[1], float(args[2]) * factor, now, request)
        entries.wrote_bytes(size_of(args[3]))

    return effect


def _set_new(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    if reply:
        entries.wrote(args[1], UNKNOWN, now, request)
        entries.wrote_bytes(size_of(args[2]))


def _set_many(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    if reply:
        for key in args[1::2]:
            entries.wrote(key, UNKNOWN, now, request)
        entries.wrote_bytes(size_of(args[2::2]))


def _set_many_for(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    if reply:
        end = 2 + 2 * int(args[1])
        seconds = lifetime_of(args[end:])
        for key in args[2:end:2]:
            entries.wrote(key, seconds, now, request)
        entries.wrote_bytes(size_of(args[3:end:2]))


def _change(first_value: int, step: int = 1) -> Effect:
    """A write to a part of an entry, which keeps its time to live. Its values begin at an argument."""

    def effect(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        entries.wrote(args[1], KEPT, now, request)
        entries.wrote_bytes(size_of(args[first_value::step]))

    return effect


def _expire(factor: float, *, at: bool = False) -> Effect:
    def effect(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        if reply:
            seconds = float(args[2]) * factor - (time() if at else 0.0)
            entries.ages.expires(args[1], now, seconds)

    return effect


def _get_and_expire(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    if reply is not None and len(args) > 2:
        entries.ages.expires(args[1], now, lifetime_of(args[2:]))


def _persist(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    entries.ages.expires(args[1], now, UNKNOWN)


def _left(factor: float) -> Effect:
    def effect(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        entries.left(args[1], float(reply) * factor, now)

    return effect


def _delete(entries: Entries, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
    for key in args[1:]:
        entries.ages.forget(key)


EFFECTS: Final[dict[str, Effect]] = {
    "SET": _set,
    "SETEX": _set_for(1.0),
    "PSETEX": _set_for(1e-3),
    "SETNX": _set_new,
    "MSET": _set_many,
    "MSETNX": _set_many,
    "MSETEX": _set_many_for,
    "APPEND": _change(2),
    "SETRANGE": _change(3),
    "HSET": _change(3, 2),
    "HMSET": _change(3, 2),
    "HSETNX": _change(3),
    "SADD": _change(2),
    "ZADD": _change(2),
    "GEOADD": _change(2),
    "LSET": _change(3),
    "JSON.SET": _change(3),
    "JSON.MERGE": _change(3),
    "EXPIRE": _expire(1.0),
    "PEXPIRE": _expire(1e-3),
    "EXPIREAT": _expire(1.0, at=True),
    "PEXPIREAT": _expire(1e-3, at=True),
    "GETEX": _get_and_expire,
    "PERSIST": _persist,
    "TTL": _left(1.0),
    "PTTL": _left(1e-3),
    **dict.fromkeys(("DEL", "UNLINK", "GETDEL", "DELEX", "RENAME", "RENAMENX", "GETSET", "RESTORE", "COPY"), _delete),
}
