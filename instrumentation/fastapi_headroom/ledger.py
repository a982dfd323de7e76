"""The wait ledger: where the time of one request went, by stage, summing to its duration.

A request is at every moment in one of three states, and the ledger charges the time that passes to

* ``on_loop`` while a step of the request's own code runs on the event loop (see ``driver``);
* the waits that are open (``enter`` without ``leave``) while no step runs. Waits that overlap, as under
  ``asyncio.gather``, share the time equally, so that the stages never sum to more than the wall time;
  ``threadpool`` takes part only while no other wait is open: waits made in the thread lie within it;
* ``other`` when nothing is open.

The end of such a time, in which the request was ready to go on while somebody else held the loop, is ``loop_blocked``.

``other`` is what is left of the duration when the request finishes, so the stages sum to it by construction.
Times are seconds of ``time.perf_counter``. The ledger is written by the loop's thread and, for sync endpoints,
by the thread that runs them; every operation on it is one that the interpreter does not tear.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from time import perf_counter
from typing import Any, Final

STAGES: Final = (
    "accept_queue",
    "on_loop",
    "loop_blocked",
    "threadpool_wait",
    "threadpool",
    "pool_wait",
    "db",
    "cache",
    "http_client",
    "publish",
    "other",
)
"""Names of the stages. ``accept_queue`` passes before the app is called and is no part of the sum."""

ACCEPT_QUEUE: Final = 0
ON_LOOP: Final = 1
LOOP_BLOCKED: Final = 2
THREADPOOL_WAIT: Final = 3
THREADPOOL: Final = 4
POOL_WAIT: Final = 5
DB: Final = 6
CACHE: Final = 7
HTTP_CLIENT: Final = 8
PUBLISH: Final = 9
OTHER: Final = 10

SCOPE_KEY: Final = "headroom.ledger"
"""Where the outermost measured app leaves the ledger in the scope (None: leave this request alone)."""

_ZEROS: Final = [0.0] * len(STAGES)


class Ledger:
    """The ledger of one request, found by hooks in ``current``.

    ``app`` is the app whose call is measured, None where that is no HTTP request. ``route`` is the route's template,
    empty until the router has matched, and ``prefix`` the templates of the mounts on the way there. ``queries``,
    ``rows`` and ``cache_calls`` are counted by probes that see them. ``trace`` and ``context`` belong to tracing,
    ``texts`` and ``shapes`` (the first statements, and how often each shape ran) to the pool probe.
    """

    __slots__ = (
        "app",
        "cache_calls",
        "context",
        "finished",
        "longest_step",
        "mark",
        "method",
        "prefix",
        "queries",
        "route",
        "rows",
        "seconds",
        "shapes",
        "started",
        "stepping",
        "texts",
        "trace",
        "waited",
        "waits",
    )

    def __init__(self, method: str = "", started: float | None = None, app: Any = None) -> None:
        self.method = method
        self.app = app
        self.route = ""
        self.prefix = ""
        self.queries = 0
        self.rows = -1
        """Rows that its statements gave back; below 0 while no driver has told a number."""
        self.cache_calls = 0
        self.texts: tuple[str, Any] | None = None
        self.shapes: dict[str, Any] | None = None
        self.trace: tuple[int, int] | None = None
        self.context: Token[Any] | None = None
        """What puts back a context variable that was set for the request; who made the ledger does so at its end."""
        self.started = perf_counter() if started is None else started
        """When the app was called."""
        self.mark = self.started
        """Up to when the time has been charged; the start of the step while one runs."""
        self.stepping = False
        """True while a step of the request runs on the event loop."""
        self.finished = False
        self.longest_step = 0.0
        """Seconds of the longest step: how long the request held the loop in one go."""
        self.waited = False
        """True once time may be charged to a stage other than ``on_loop`` and ``other``."""
        self.waits: list[int] = []
        """Stages that are open, once per ``enter``."""
        self.seconds: list[float] = _ZEROS.copy()
        """Seconds by stage; ``other`` is there once the request has finished."""

    def enter(self, stage: int) -> None:
        """Open a wait of that stage. It may nest in and overlap with others."""
        if not self.stepping:
            self.charge(perf_counter())
        self.waited = True
        self.waits.append(stage)

    def leave(self, stage: int) -> None:
        """Close a wait of that stage; without effect when none is open."""
        if not self.stepping:
            self.charge(perf_counter())
        try:
            self.waits.remove(stage)
        except ValueError:
            pass

    def charge(self, now: float, blocked: float = 0.0) -> None:
        """Charge the time since ``mark`` to the waits that are open. Only while no step runs.

        The last ``blocked`` seconds of it go to ``loop_blocked``: the request was ready and could not move.
        """
        elapsed = max(0.0, now - self.mark - blocked)  # the difference of two times may round to less than nothing
        self.mark = now
        if self.finished:
            return
        seconds = self.seconds
        if blocked:
            self.waited = True
            seconds[LOOP_BLOCKED] += blocked
        waits = self.waits.copy() if self.waits else self.waits  # a thread may close one meanwhile
        if len(waits) == 1:
            seconds[waits[0]] += elapsed
        elif waits:
            # While a thread of the request waits for something, that is what the request waits for.
            inner = [stage for stage in waits if stage != THREADPOOL] or waits
            share = elapsed / len(inner)
            for stage in inner:
                seconds[stage] += share

    def charge_step(self, now: float) -> None:
        """Charge the time since ``mark`` to ``on_loop``: the step that began there ends, or the request within it."""
        elapsed = now - self.mark
        self.mark = now
        self.seconds[ON_LOOP] += elapsed
        if elapsed > self.longest_step:
            self.longest_step = elapsed

    def finish(self, now: float) -> float:
        """Close the books at ``now`` and return the duration. What comes later (background tasks) does not count."""
        seconds = self.seconds
        if self.stepping:
            elapsed = now - self.mark
            self.mark = now
            seconds[ON_LOOP] += elapsed
            if elapsed > self.longest_step:
                self.longest_step = elapsed
        else:
            self.charge(now)
        self.finished = True
        in_flight.discard(self)
        duration = now - self.started
        rest = duration - (sum(seconds) - seconds[ACCEPT_QUEUE] if self.waited else seconds[ON_LOOP])
        if rest > 0.0:
            seconds[OTHER] = rest
        return duration


current: ContextVar[Ledger | None] = ContextVar("headroom_ledger", default=None)
"""The ledger of the request that this code runs for."""

in_flight: set[Ledger] = set()
"""The ledgers of the requests that are being served; who measures a request adds its own, ``finish`` takes it out."""
