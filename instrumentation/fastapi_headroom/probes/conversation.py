"""One WebSocket: connections, messages each way, lifetime and how it ended, seen from outside the app."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Final

from starlette.websockets import WebSocketDisconnect

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.exchange import UNMATCHED, Message
from fastapi_headroom.probes.request_series import Table, WebSocketSeries

_NORMAL: Final = frozenset({1000, 1001, 1005, 1012})
"""Codes of RFC 6455 that mean nothing bad: done, going away, none given, and the server's own restart."""
_FAULTS: Final = frozenset({1011, 1013, 1014})
"""Codes with which a server says that it is at fault: internal error, overloaded, bad gateway."""
_NO_CODE: Final = 1005
_ABNORMAL: Final = 1006
_FIRST_OWN_CODE: Final = 3000
"""Codes from here on mean what the app says they mean."""


class Conversation:
    """Stands between the server and the app for one WebSocket. The connection counts from its acceptance on."""

    __slots__ = ("_by_app", "_by_client", "_guard", "_ledger", "_receive", "_refused", "_send", "_series", "_started",
                 "_table")  # fmt: skip

    def __init__(
        self,
        table: Table,
        guard: Guard,
        ledger: Ledger,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self._table = table
        self._guard = guard
        self._ledger = ledger
        self._receive = receive
        self._send = send
        self._started = 0.0
        self._series: WebSocketSeries | None = None
        self._by_app: int | None = None
        """The code with which the app closed, if it did so first."""
        self._by_client: int | None = None
        """The code that the server reported for the client's end."""
        self._refused = False

    async def receive(self) -> Message:
        """Hand a message to the app and count it."""
        message = await self._receive()
        kind = message.get("type")
        if kind == "websocket.receive":
            if self._series is not None:
                self._series.received()
        elif kind == "websocket.disconnect" and self._by_app is None:
            self._by_client = message.get("code") or _NO_CODE
        return message

    async def send(self, message: Message) -> None:
        """Hand a message to the server and count it."""
        try:
            await self._send(message)
        except OSError:  # how servers tell that the client has gone
            self._by_client = self._by_client or _ABNORMAL
            raise
        kind = message.get("type")
        if kind == "websocket.send":
            if self._series is not None:
                self._series.sent()
        elif self._series is None:
            if kind == "websocket.accept":
                self._accepted()
            else:  # closed or answered by a response before it was accepted
                self._refused = True
        elif kind == "websocket.close" and self._by_client is None:
            self._by_app = message.get("code") or 1000

    def _accepted(self) -> None:
        try:
            self._started = perf_counter()
            self._series = self._table.websocket(self._ledger.route or UNMATCHED)
            self._series.opened()
        except Exception as error:
            self._guard.failed(error)

    def exit(self, error: BaseException | None) -> None:
        """Count the connection as ended; ``error`` is what the app raised. Never raises."""
        try:
            if self._series is not None:
                self._series.closed()
                self._series.lifetime(perf_counter() - self._started)
            series = self._series or self._table.websocket(self._ledger.route or UNMATCHED)
            series.ended[self._reason(error)]()
        except Exception as failure:
            self._guard.failed(failure)

    def _reason(self, error: BaseException | None) -> str:
        if self._refused:
            return "rejected"
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        # Code that talks to a client who has gone raises these as a matter of course.
        gone = self._by_client is not None and isinstance(error, WebSocketDisconnect | OSError)
        if error is not None and not gone and not isinstance(error, asyncio.CancelledError):
            return "error"
        if self._by_app is not None:
            if self._by_app in _NORMAL or self._by_app >= _FIRST_OWN_CODE:
                return "normal"
            return "error" if self._by_app in _FAULTS else "rejected"
        if self._by_client is not None:
            fine = self._by_client in _NORMAL or self._by_client >= _FIRST_OWN_CODE
            return "normal" if fine and self._series is not None else "abnormal"
        if error is not None:  # cancelled
            return "abnormal"
        return "normal" if self._series is not None else "error"
