"""WebSockets: their routes, and how they end."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
import uvicorn
from fastapi import FastAPI, Response, WebSocket, WebSocketException
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fastapi_headroom.ledger import Ledger, current
from tests.support.measured import DURATION, Measured, eventually

CLOSES = "headroom_websocket_closes_total"
OPEN = "headroom_websocket_connections"
Implementation = Literal["websockets", "websockets-sansio", "wsproto"]


@pytest.fixture(params=["websockets", "websockets-sansio", "wsproto"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Each of uvicorn's implementations, as far as it is there."""
    name: Implementation = request.param
    if name not in uvicorn.config.WS_PROTOCOLS:
        pytest.skip(f"this uvicorn has no {name}")
    if name == "wsproto":
        pytest.importorskip("wsproto")
    return name


class Served:
    """An app served by uvicorn on a thread."""

    def __init__(self, app: Any, implementation: Implementation) -> None:
        config = uvicorn.Config(app, port=0, ws=implementation, log_level="critical", timeout_graceful_shutdown=2)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> Served:
        self._thread.start()
        eventually(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Shut the server down."""
        self.server.should_exit = True
        self._thread.join()

    def connect(self, path: str) -> ClientConnection:
        """Open a WebSocket."""
        return connect(f"ws://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}{path}")


def make_app() -> FastAPI:
    """Make an app whose WebSockets do as their first message says."""
    app = FastAPI()

    @app.websocket("/rooms/{room}")
    async def room(websocket: WebSocket, room: str) -> None:
        if room == "refused":
            await websocket.close(1008)
            return
        if room == "denied":
            await websocket.send_denial_response(Response("no", 401))
            return
        if room == "forgotten":
            return
        if room == "broken":
            raise LookupError
        await websocket.accept()
        async for text in websocket.iter_text():
            if text == "raise":
                raise ConnectionRefusedError("a database of the app's own")
            if text == "policy":
                raise WebSocketException(1008)
            if text == "endless":
                while True:
                    await websocket.send_text("x" * 100)
                    await asyncio.sleep(0.001)
            if text.isdigit():
                await websocket.close(int(text))
                return
            await websocket.send_text(text)

    return app


def test_every_end_has_its_reason(measure: Callable[..., Measured], implementation: Implementation) -> None:
    """Closed by either side, refused, forgotten, raised: one count each, and nothing stays open."""
    measured = measure(make_app())
    expected: dict[tuple[str, ...], float] = {}

    def ended(reason: str) -> None:
        key = ("/rooms/{room}", reason)
        expected[key] = expected.get(key, 0) + 1
        eventually(lambda: measured.nonzero(CLOSES) == expected)

    with Served(measured.app, implementation) as served:
        for room, reason in (
            ("refused", "rejected"),
            ("denied", "rejected"),
            ("forgotten", "error"),
            ("broken", "error"),
        ):
            with pytest.raises(InvalidStatus):
                served.connect(f"/rooms/{room}")
            ended(reason)
        for word, reason in (
            ("raise", "error"),
            ("1011", "error"),
            ("policy", "rejected"),
            ("1000", "normal"),
            ("4001", "normal"),
        ):
            with served.connect("/rooms/1") as client, pytest.raises(ConnectionClosed):
                client.send(word)
                client.recv(timeout=5)
            ended(reason)
        for code, reason in ((1000, "normal"), (1001, "normal"), (4000, "normal"), (1002, "abnormal")):
            with served.connect("/rooms/1") as client:
                client.send("hello")
                assert client.recv(timeout=5) == "hello"
                client.close(code)
            ended(reason)
    assert measured.nonzero(OPEN) == {}
    assert measured.value("headroom_stream_lifetime_seconds_count", http_route="/rooms/{room}", kind="websocket") == 9
    assert measured.nonzero(DURATION + "_count") == {}
    assert measured.nonzero("headroom_probe_errors_total") == {}


def vanish(client: ClientConnection) -> None:
    """Go without a word."""
    client.socket.shutdown(socket.SHUT_RDWR)
    client.socket.close()


def test_a_client_that_vanishes_is_an_end(measure: Callable[..., Measured], implementation: Implementation) -> None:
    """A connection that breaks while the app waits, or sends, ends once and is no error of the app's."""
    measured = measure(make_app())
    told = implementation == "websockets"  # the others report 1005, as after a close without a code
    with Served(measured.app, implementation) as served:
        for number, word in enumerate(("hello", "endless"), 1):
            with served.connect("/rooms/1") as client:
                client.send(word)
                client.recv(timeout=5)
                vanish(client)
            eventually(lambda number=number: sum(measured.nonzero(CLOSES).values()) == number)
    found = {reason: count for (_, reason), count in measured.nonzero(CLOSES).items()}
    assert "error" not in found
    assert sum(found.values()) == 2
    if told:
        assert found == {"abnormal": 2}
    assert measured.nonzero(OPEN) == {}


def test_a_server_that_stops_ends_its_websockets(
    measure: Callable[..., Measured], implementation: Implementation
) -> None:
    """What a shutdown closes is counted, as no error."""
    measured = measure(make_app())
    with Served(measured.app, implementation) as served, served.connect("/rooms/1") as client:
        client.send("hello")
        client.recv(timeout=5)
        served.stop()
    assert sum(measured.nonzero(CLOSES).values()) == 1
    assert ("/rooms/{room}", "error") not in measured.nonzero(CLOSES)
    assert measured.nonzero(OPEN) == {}


def test_mounted_websockets_have_their_whole_template(measure: Callable[..., Measured]) -> None:
    """Templates pass through mounts of plain Starlette; unknown paths share one value, however many are tried."""

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    inner = Starlette(routes=[Mount("/{tenant}", routes=[WebSocketRoute("/live/{x}", echo)])])
    app = FastAPI()
    app.mount("/deep", inner)
    measured = measure(app)
    with Served(measured.app, "websockets-sansio") as served:
        with served.connect("/deep/t1/live/9") as client, pytest.raises(ConnectionClosed):
            client.recv(timeout=5)
        for number in range(5):
            with pytest.raises(InvalidStatus):
                served.connect(f"/nothing/{number}")
        eventually(lambda: sum(measured.nonzero(CLOSES).values()) == 6)
    assert measured.nonzero(CLOSES) == {("/deep/{tenant}/live/{x}", "normal"): 1, ("_unmatched", "rejected"): 5}


def test_excluded_websockets_leave_no_trace(measure: Callable[..., Measured]) -> None:
    """A path of the setting is served and not counted."""
    measured = measure(make_app(), excluded_paths=("/rooms/*",))
    with Served(measured.app, "websockets-sansio") as served, served.connect("/rooms/1") as client:
        client.send("hello")
        assert client.recv(timeout=5) == "hello"
        assert measured.nonzero(OPEN) == {}
    assert measured.nonzero(CLOSES) == {}
    assert measured.nonzero("headroom_websocket_messages_total") == {}


def test_a_conversation_that_is_closed_elsewhere_leaves_that_place_alone(measure: Callable[..., Measured]) -> None:
    """The clean-up of a coroutine that was thrown away does not take the ledger of the request in which it runs."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def receive() -> Any:
        await asyncio.get_running_loop().create_future()

    async def thrown_away() -> None:
        coroutine = measured.app({"type": "websocket", "path": "/", "headers": []}, receive, None)
        contextvars.copy_context().run(coroutine.send, None)
        mine = Ledger()
        current.set(mine)
        coroutine.close()
        assert current.get() is mine

    measured = measure(app)
    asyncio.run(thrown_away())
    assert measured.nonzero(CLOSES) == {("_unmatched", "error"): 1}
