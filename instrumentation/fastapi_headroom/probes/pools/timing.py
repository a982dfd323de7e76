"""The two things of a checkout that take time, as ``with`` blocks that sync and async hooks share."""

from __future__ import annotations

from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger

if TYPE_CHECKING:
    from fastapi_headroom.probes.pools.meter import Meter


class Wait:
    """One checkout that may wait: begun, and ended once. As a ``with`` block it lasts until that ends at the latest."""

    __slots__ = ("meter", "refusal", "request", "started", "suspended", "waits")

    def __init__(self, meter: Meter, request: Ledger | None, refusal: type[BaseException] | tuple[()] = ()) -> None:
        self.meter = meter
        self.request = request
        self.refusal = refusal
        """What the pool raises when the wait was in vain; an error that comes after the wait is none."""
        self.suspended = False
        self.waits = True
        """False once a connection was found, or the checkout given up."""
        self.started = perf_counter()

    def __enter__(self) -> Wait:
        waiting.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        waiting.set(None)
        if self.waits:
            if kind is not None and issubclass(kind, self.refusal):
                self.meter.refused()
            self.meter.end(self)


waiting: ContextVar[Wait | None] = ContextVar("headroom_pool_wait", default=None)
"""The checkout that this code runs for, also in the task that a library waits in for its time-out."""


class Creation:
    """The opening of a connection, counted if it succeeds. A request for which it is opened spends it in ``db``."""

    __slots__ = ("_meter", "_request", "_started")

    def __init__(self, meter: Meter, request: Ledger | None) -> None:
        self._meter = meter
        self._request = request

    def __enter__(self) -> None:
        if self._request is not None:
            self._request.enter(ledger.DB)
        self._started = perf_counter()

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._request is not None:
            self._request.leave(ledger.DB)
        if kind is None:
            self._meter.made(self._started)
