"""One WebSocket: connections, messages each way and lifetime, seen from outside the app."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import perf_counter

from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.exchange import UNMATCHED, Message
from fastapi_headroom.probes.request_series import Table, WebSocketSeries


class Conversation:
    """Stands between the server and the app for one WebSocket. The connection counts from its acceptance on."""

    __slots__ = ("_guard", "_ledger", "_receive", "_send", "_series", "_started", "_table")

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

    async def receive(self) -> Message:
        """Hand a message to the app and count it."""
        message = await self._receive()
        if self._series is not None and message.get("type") == "websocket.receive":
            self._series.received()
        return message

    async def send(self, message: Message) -> None:
        """Hand a message to the server and count it."""
        await self._send(message)
        kind = message.get("type")
        if kind == "websocket.send" and self._series is not None:
            self._series.sent()
        elif kind == "websocket.accept" and self._series is None:
            try:
                self._started = perf_counter()
                self._series = self._table.websocket(self._ledger.route or UNMATCHED)
                self._series.opened()
            except Exception as error:
                self._guard.failed(error)

    def exit(self) -> None:
        """Count the connection as closed."""
        if self._series is not None:
            self._series.closed()
            self._series.lifetime(perf_counter() - self._started)
