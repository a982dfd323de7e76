"""What responses tell clients and proxies about keeping them: Cache-Control, the outermost level of caching.

Counted are answers of 2xx and 3xx to GET and HEAD, the ones that a cache keeps. An answer that says nothing costs a
look at its headers and writes nothing: how many those are is the difference to the answers counted elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.headers import Headers
from fastapi_headroom.store.writer import Writer

NAME_LENGTH: Final = len("cache-control")
_READ: Final = 512
"""Bytes of the header that are looked at."""
_LONGEST: Final = 2**31
"""Seconds that a longer lifetime counts as, as RFC 9111 (1.2.2) has it."""
_REMEMBERED: Final = 16
"""Values of the header per route whose meaning is remembered."""

Write = Callable[[float], None]


class CachePolicies:
    """Counts what one route's responses say, by policy."""

    __slots__ = ("_known", "_max_age", "_route", "_writer")

    def __init__(self, writer: Writer, route: str) -> None:
        self._writer = writer
        self._route = route
        self._known: dict[bytes, tuple[Write, float]] = {}
        """What counts a value of the header, and its seconds."""
        self._max_age: Write | None = None

    def note(self, headers: Headers) -> None:
        """Count the response if it has a Cache-Control; several of them count as one, as RFC 9110 (5.3) has it."""
        said: bytes | None = None
        for name, value in headers:
            if len(name) == NAME_LENGTH and name.lower() == b"cache-control":
                said = value if said is None else said + b"," + value
        if said is not None:
            count, seconds = self._known.get(said) or self._judge(said)
            count(1.0)
            if seconds:
                (self._max_age or self._make_max_age())(seconds)

    def _judge(self, said: bytes) -> tuple[Write, float]:
        policy, seconds = judge(bytes(said[:_READ]))
        count = self._writer.counter(catalog.RESPONSE_CACHE_POLICIES, self._route, policy).inc
        if len(self._known) >= _REMEMBERED:  # a route that states the time left: there is no end of them
            self._known.clear()
        self._known[bytes(said)] = count, seconds
        return count, seconds

    def _make_max_age(self) -> Write:
        self._max_age = self._writer.counter(catalog.RESPONSE_MAX_AGE, self._route).inc
        return self._max_age


def judge(said: bytes) -> tuple[str, float]:
    """Return the policy that a Cache-Control states, and for how many seconds a response may be used unasked.

    ``no_store``: nobody keeps it. ``revalidate``: kept, and asked for each time (``no-cache``, or a lifetime of 0).
    ``private`` and ``public``: used unasked for the seconds returned, by the client or by proxies as well.
    ``no_lifetime``: none of these, and no lifetime: clients guess one, or ask. The strictest directive wins, and of
    the lifetimes that of shared caches (s-maxage), where they may keep it.
    """
    directives: dict[bytes, bytes] = {}
    for item in said.lower().split(b","):
        name, _, value = item.strip().partition(b"=")
        directives.setdefault(name.strip(), value.strip().strip(b'"'))
    if b"no-store" in directives:
        return "no_store", 0.0
    private = b"private" in directives
    lifetime = directives.get(b"max-age")
    if not private:
        lifetime = directives.get(b"s-maxage", lifetime)
    if b"no-cache" in directives:
        return "revalidate", 0.0
    if lifetime is None:
        return "no_lifetime", 0.0
    # A lifetime that cannot be read makes the response stale at once (RFC 9111, 4.2.1).
    seconds = float(min(int(lifetime), _LONGEST)) if lifetime.isdigit() else 0.0
    if not seconds:
        return "revalidate", 0.0
    return "private" if private else "public", seconds
