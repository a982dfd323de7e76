"""How old entries are when they are served, where this process can know it.

It knows what it wrote with a time to live, until that has run out: then somebody else wrote the entry. Where the app
asks for the time that an entry has left, its age follows from the time to live that such entries get. Nothing is asked
of the server for this. Keys are kept as hashes, and only so many.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

MAX_ENTRIES: Final = 2_000
"""Entries per cache whose time of writing is remembered; the oldest are forgotten first."""
UNKNOWN: Final = -1.0
"""A time to live that was not seen."""
KEPT: Final = -2.0
"""The time to live stays what it was (KEEPTTL)."""
_ALIKE: Final = 0.2
"""Share by which times to live of one pattern may differ (jitter) and still tell an age."""


def place_of(key: object) -> int:
    """Return the hash under which a key is remembered."""
    try:
        return hash(key)
    except TypeError:  # a bytearray
        return hash(bytes(key))  # type: ignore[call-overload]


class LifeTime:
    """The time to live that entries of one key pattern are written with, in seconds."""

    __slots__ = ("_varies", "seconds")

    def __init__(self) -> None:
        self.seconds = UNKNOWN
        self._varies = False

    def saw(self, seconds: float) -> None:
        """Take note of one."""
        if seconds == self.seconds or self._varies:
            return
        if self.seconds > 0 and abs(seconds - self.seconds) > _ALIKE * self.seconds:
            self._varies, self.seconds = True, UNKNOWN
        else:
            self.seconds = seconds


class Ages:
    """When entries were written and when they expire, by the hash of their key. Seconds of ``perf_counter``."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: dict[int, tuple[float, float]] = {}

    def wrote(self, key: object, now: float, seconds: float) -> None:
        """Remember that an entry was written, with a time to live of so many seconds (or UNKNOWN, or KEPT)."""
        place = place_of(key)
        if seconds > 0:
            expires = now + seconds
        elif seconds == KEPT:
            known = self.entries.get(place)
            expires = known[1] if known is not None else 0.0
        else:
            expires = 0.0  # not known unless it is told next, as after HSET
        self._remember(place, (now, expires))

    def expires(self, key: object, now: float, seconds: float) -> None:
        """Remember that an entry that is there expires in so many seconds; UNKNOWN: it no longer does."""
        known = self.entries.get(place_of(key))
        if known is not None:
            self.entries[place_of(key)] = (known[0], now + seconds if seconds > 0 else 0.0)

    def left(self, key: object, now: float, remaining: float, lifetime: float) -> None:
        """Conclude an entry's age from the seconds that it has left, of those that such entries get."""
        if 0 < remaining <= lifetime:
            self._remember(place_of(key), (now - (lifetime - remaining), now + remaining))

    def forget(self, key: object) -> None:
        """Forget an entry: it was deleted."""
        self.entries.pop(place_of(key), None)

    def of(self, key: object, now: float) -> float | None:
        """Return the age in seconds of an entry that is served now, None where it is not known."""
        known = self.entries.get(place_of(key))
        if known is None:
            return None
        written, expires = known
        if now < expires:
            return now - written
        if expires:
            self.entries.pop(place_of(key), None)
        return None

    def _remember(self, place: int, entry: tuple[float, float]) -> None:
        entries = self.entries
        if entries.pop(place, None) is None and len(entries) >= MAX_ENTRIES:
            for old in list(islice(entries, MAX_ENTRIES // 10)):
                entries.pop(old, None)
        entries[place] = entry  # as the latest
