"""Blocking calls made on the thread of a running event loop: which kind, and by which of the user's functions.

The watchdog sees what holds the loop for 100 ms. This counts the calls that should not be there at all, however
short they are today: a synchronous Redis call of 0.3 ms is a stall of five seconds when Redis stalls.

Only the thread of a running loop is looked at, so the same call in a sync endpoint or a thread costs a function call
and counts nothing. Of calls within calls (a look-up of a name within an HTTP call) the outermost counts.
"""

from __future__ import annotations

import logging
import sys
import time
from asyncio import _get_running_loop
from collections.abc import Callable
from functools import wraps
from threading import get_ident
from time import perf_counter
from types import FrameType
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.ledger import Ledger, current
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blame import Look, outwards, owner_of, site_of
from fastapi_headroom.probes.blocking_places import PLACES, REMEDIES, Place
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.store.writer import Counter, Writer

log = logging.getLogger("fastapi_headroom")

SITES: Final = 50
"""Sites that get series of their own; later ones are ``other``."""
LOG_INTERVAL: Final = 5.0
"""Seconds between two log records; each kind and site has one in the life of a process."""


class BlockingCalls:
    """Wraps the blocking calls of the standard library and of the libraries that the app uses, and counts them."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._patches = Patches()
        self._writer: Writer | None = None
        self._attached: set[str] = set()
        self._inside: set[int] = set()
        self._sites = BoundedNames(SITES, other="other")
        self._counters: dict[tuple[str, str], Counter] = {}
        self._logged: set[tuple[str, str]] = set()
        self._log_due = 0.0

    def bind(self, writer: Writer) -> None:
        """Resolve handles and wrap what has been imported; ``sample`` wraps what comes later."""
        self._writer = writer
        self._counters = {}
        self._sites = BoundedNames(SITES, other="other")
        self._inside = set()
        self.sample()

    def sample(self) -> None:
        """Wrap the libraries that were imported since."""
        if self._writer is None:
            return
        for place in PLACES:
            if place.module in sys.modules and place.name not in self._attached:
                owner = place.owner()
                # It may be half imported now, and another version may keep it elsewhere.
                if owner is not None and place.attribute in vars(owner):
                    self._patches.wrap(owner, place.attribute, self._wrapper_of(place))
                    self._attached.add(place.name)

    def close(self) -> None:
        """Put every call back. Idempotent."""
        self._writer = None
        self._patches.restore()
        self._attached.clear()

    def _wrapper_of(self, place: Place) -> Callable[[Any], Any]:
        kind, least, watched = place.kind, place.least, self._watched

        def make(original: Any) -> Any:
            @wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                if _get_running_loop() is None:
                    return original(*args, **kwargs)
                return watched(kind, least, original, args, kwargs)

            return call

        def make_sleep(original: Any) -> Any:
            # By what is asked for: a sleep(0) that found the machine busy only gave way.
            @wraps(original)
            def sleep(seconds: Any, /) -> Any:
                if _get_running_loop() is None or (isinstance(seconds, int | float) and seconds < least):
                    return original(seconds)
                return watched(kind, least, original, (seconds,), {})

            return sleep

        def make_of_dialect(original: Any) -> Any:
            # SQLAlchemy's async engines run the same code on the loop, in a greenlet, and do not block there.
            @wraps(original)
            def call(dialect: Any, *args: Any, **kwargs: Any) -> Any:
                if dialect.is_async or _get_running_loop() is None:
                    return original(dialect, *args, **kwargs)
                return watched(kind, least, original, (dialect, *args), kwargs)

            return call

        if place.kind == "sleep":
            return make_sleep
        return make_of_dialect if place.of_dialect else make

    def _watched(
        self, kind: str, least: float, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call on a loop's thread and count it if it took ``least`` seconds."""
        me, inside = get_ident(), self._inside
        if me in inside or self._writer is None:
            return original(*args, **kwargs)
        inside.add(me)
        started = perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            inside.discard(me)
            if perf_counter() - started >= least:
                self._count(kind, sys._getframe(1))

    def found_in_file(self, look: Look, thread: int) -> None:
        """Count a call on a file that the watchdog found a loop's thread in, unless a wrap is about to count it."""
        if thread in self._inside:
            return
        try:
            found = (entry.partition(" ")[0].rpartition(":") for entry in look.sample.stack)
            line = next((f" (line {line})" for name, _, line in found if owner_of(name) == "user"), "")
            self._add("file", look.sample.site, line, look.sample.ledger)
        except Exception as error:
            self._guard.failed(error)

    def _count(self, kind: str, frame: FrameType) -> None:
        try:
            if _made_by_us(frame):
                return
            lines = (f.f_lineno for f in outwards(frame) if owner_of(f.f_code.co_filename) == "user")
            line = next((f" (line {line})" for line in lines), "")
            self._add(kind, site_of(outwards(frame)), line, current.get())
        except Exception as error:
            self._guard.failed(error)

    def _add(self, kind: str, site: str, line: str, request: Ledger | None) -> None:
        writer = self._writer
        if writer is None:
            return
        site = self._sites(site)
        counter = self._counters.get((kind, site))
        if counter is None:
            counter = self._counters[kind, site] = writer.counter(catalog.BLOCKING_CALLS, kind, site)
        counter.inc()
        if (kind, site) not in self._logged:
            self._log(kind, site, line, request)

    def _log(self, kind: str, site: str, line: str, request: Ledger | None) -> None:
        now = time.monotonic()
        if now < self._log_due:
            return  # its next call is soon enough
        self._log_due = now + LOG_INTERVAL
        self._logged.add((kind, site))
        route = f" while serving {request.route}" if request is not None and request.route else ""
        log.warning(
            "fastapi-headroom: %s%s makes a blocking call (%s) on the loop's thread%s: every other request of this "
            "worker waits meanwhile; %s",
            *(site, line, kind, route, REMEDIES[kind]),
        )


def _made_by_us(frame: FrameType) -> bool:
    """Return whether code of this package makes the call: opening the store is no call of the user's."""
    owners = (owner_of(f.f_code.co_filename) for f in outwards(frame) if f.f_code.co_filename != _HERE)
    return next((owner for owner in owners if owner != "stdlib"), "user") == "ours"


_HERE: Final = _made_by_us.__code__.co_filename
