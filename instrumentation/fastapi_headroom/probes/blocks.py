"""Blocks of the event loop: what one is, and what becomes of it: series, a log record, events of spans."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from fastapi_headroom import catalog, ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.blame import UNKNOWN, Cause, Sample
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.store.writer import Counter, Writer
from fastapi_headroom.tracing import spans

log = logging.getLogger("fastapi_headroom")

SITES: Final = 50
"""Sites that get series of their own; later ones are ``other``."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two log records about blocks; the second tells how many came between."""
STILL_BLOCKED: Final = 5.0
"""Seconds after which a block is logged although it lasts: it may never end."""
MOST_EVENTS: Final = 10
"""Latest blocks of its time that a request's span tells of."""

since: Callable[[float, float, tuple[float, Ledger] | None], list[Block]] | None = None
"""Returns the blocks between two moments (``time.monotonic``), the one that goes on included; set by the loop probe.

The third argument is when the step that runs began, and the request whose step it is.
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A time in which one step held the loop. Times are ``time.monotonic``; ``ended`` is now while it lasts."""

    began: float
    ended: float
    site: str
    cause: Cause
    sample: Sample | None
    """A look at the stack that found the loop there."""
    requests: frozenset[Ledger]
    """Requests that were in flight meanwhile."""
    starved: float = 0.0
    """Seconds of it in which the loop's thread was ready and got no CPU."""
    request: Ledger | None = None
    """The request whose step it was, where that is known without a sample."""

    def is_by(self, request: Ledger) -> bool:
        """Return whether it was a step of this request."""
        return self.request is request or (self.sample is not None and self.sample.ledger is request)

    @property
    def seconds(self) -> float:
        """How long the loop was held."""
        return self.ended - self.began

    def losses(self) -> list[float]:
        """Return the seconds that each request in flight lost: the part of the block that it was there.

        The request that held the loop is one of them.
        """
        ahead = time.perf_counter() - time.monotonic()  # ledgers keep time by the former
        began, ended = self.began + ahead, self.ended + ahead
        until = ((request, min(ended, request.mark) if request.finished else ended) for request in self.requests)
        lost = (end - max(began, request.started) for request, end in until)
        return [seconds for seconds in lost if seconds > 0]  # some came or went around it


class Reporter(Protocol):
    """Is told of blocks, on the watchdog's thread."""

    def lasts(self, block: Block) -> None:
        """Take note of a block that goes on; called again and again until it is over."""

    def over(self, block: Block) -> None:
        """Take note of a block that is over."""


class Account:
    """Counts blocks in the store, while they last, and logs them."""

    def __init__(self, writer: Writer, threshold: float) -> None:
        self._writer, self._threshold = writer, threshold
        self._sites = BoundedNames(SITES, other="other")
        self._counted: dict[tuple[str, Cause], float] = {}
        """Of the block that goes on."""
        self._still_logged = False
        self._logged_at = float("-inf")
        self._unlogged = 0

    def lasts(self, block: Block) -> None:
        """Count the block so far."""
        self._count(block)
        if block.seconds >= STILL_BLOCKED and not self._still_logged:
            self._still_logged = True
            self._log("is still blocked after", block)

    def over(self, block: Block) -> None:
        """Count what is left of it, and the block."""
        self._count(block)
        self._writer.counter(catalog.LOOP_BLOCKS, self._bounded(block.site), block.cause).inc()
        self._log("was blocked for", block)
        self._counted.clear()
        self._still_logged = False

    def _count(self, block: Block) -> None:
        """Bring what is counted for this block up to its seconds; what was put down to another cause stays there."""
        if block.cause != "starved" and block.starved >= self._threshold:  # the code would not have held it for that
            self._add(UNKNOWN, "starved", block.starved - self._counted.get((UNKNOWN, "starved"), 0.0))
        self._add(block.site, block.cause, block.seconds - sum(self._counted.values()))

    def _add(self, site: str, cause: Cause, seconds: float) -> None:
        if seconds > 0:
            self._counted[site, cause] = self._counted.get((site, cause), 0.0) + seconds
            self._counter(site, cause).inc(seconds)

    def _counter(self, site: str, cause: Cause) -> Counter:
        site = self._bounded(site)
        self._writer.counter(catalog.LOOP_BLOCKS, site, cause)  # both series are there from the start
        return self._writer.counter(catalog.LOOP_BLOCKED, site, cause)

    def _bounded(self, site: str) -> str:
        return site if site == UNKNOWN else self._sites(site)

    def _log(self, what: str, block: Block) -> None:
        now = time.monotonic()
        if now - self._logged_at < LOG_INTERVAL:
            self._unlogged += 1
            return
        self._logged_at = now
        sample, losses = block.sample, block.losses()
        request = block.request or (sample.ledger if sample is not None else None)
        route = f" while serving {request.route}" if request is not None and request.route else ""
        several = "request" if len(losses) == 1 else "requests"
        flight = f"; {len(losses)} {several} in flight lost {sum(losses):.3f} s together" if losses else ""
        more = f" ({self._unlogged} more since the last record)" if self._unlogged else ""
        self._unlogged = 0
        if block.cause != "starved" and block.starved >= self._threshold:
            more = f", {block.starved:.3f} s of it without a CPU{more}"
        stack = "".join(f"\n    {line}" for line in sample.stack) if sample is not None else ""
        log.warning(
            "fastapi-headroom: the event loop %s %.3f s by %s (%s)%s%s%s%s",
            *(what, block.seconds, block.site, block.cause, route, flight, more),
            stack and f"; innermost first:{stack}",
        )


def tell_span(request: Ledger) -> None:
    """Add an event to the current span for each block that the request met. Call it before the span ends."""
    if since is None:
        return
    now = time.monotonic()
    ahead = time.perf_counter() - now
    to_epoch = time.time() - now
    step = (request.mark - request.longest_step - ahead, request)  # its last step, if that was the longest
    for block in since(request.started - ahead, now, step)[-MOST_EVENTS:]:
        attributes: dict[str, str | float | bool] = {
            "site": block.site,
            "cause": block.cause,
            "seconds": round(block.seconds, 6),
            "by_this_request": block.is_by(request),
        }
        spans.add_event("event_loop.blocked", int((block.began + to_epoch) * 1e9), attributes)


def in_flight() -> frozenset[Ledger]:
    """Return the requests that are being served by this process now."""
    return frozenset(ledger.in_flight)
