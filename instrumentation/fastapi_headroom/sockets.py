"""When the answer came that a suspended coroutine waits for: asked of the kernel, which saw it arrive.

The socket is found in the frames of the suspended coroutines themselves, so it is that of this wait and no other,
whichever library made it, and nothing has to be noted before it is asked for.
"""

from __future__ import annotations

import gc
import socket
import struct
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Final

DEPTH: Final = 200
"""Coroutines that wait for one another, at most this many."""
INNERMOST: Final = 8
"""How many of the innermost ones are searched."""
_TCP_INFO: Final[int | None] = getattr(socket, "TCP_INFO", None)
_LAST_DATA_RECEIVED: Final = 52
"""Offset of ``tcpi_last_data_recv`` in ``struct tcp_info`` (linux/tcp.h): milliseconds since data came, 32 bits."""
_HOLDERS: Final = ("_transport", "transport", "_connection", "_con", "_protocol")
"""Attributes by which one comes from what a coroutine is a method of to the transport."""
Locals = Mapping[str, Any]


def _of_self(variables: Locals) -> Any:
    return variables.get("self")


_FINDERS: Final[Mapping[str, Callable[[Locals], Any]]] = {
    "asyncio.streams": _of_self,  # redis, aiomysql, asyncmy: StreamReader
    "asyncio.selector_events": lambda variables: variables.get("sock"),
    "asyncpg": _of_self,  # Connection, PreparedStatement, Transaction, Cursor
    "anyio._backends._asyncio": _of_self,  # httpx: SocketStream
    "aiohttp": _of_self,  # ResponseHandler, StreamReader, ClientResponse
    "uvicorn": _of_self,  # the rest of a request's body: RequestResponseCycle
    "psycopg.waiting": lambda variables: variables.get("fileno"),
}
"""By module or package of a coroutine: what of its variables leads to the socket."""


def seconds_since_data(connection: Any) -> float | None:
    """Return how long ago data came over a transport, socket or file descriptor.

    Exact to the kernel's tick (1 to 10 ms). None when it is no TCP socket, or the system does not tell.
    """
    if _TCP_INFO is None:
        return None
    try:
        if hasattr(connection, "get_extra_info"):
            connection = connection.get_extra_info("socket")
        if isinstance(connection, int):
            borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=connection)
            try:
                info = borrowed.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _LAST_DATA_RECEIVED + 4)
            finally:
                borrowed.detach()
        else:
            info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _LAST_DATA_RECEIVED + 4)
        milliseconds: int = struct.unpack_from("=I", info, _LAST_DATA_RECEIVED)[0]
    except (OSError, AttributeError, struct.error):  # closed, of another family, or no socket at all
        return None
    return milliseconds * 1e-3


def awaited_by(coroutine: Any) -> Any:
    """Return the transport, socket or file descriptor that a suspended coroutine waits for; None if there is none."""
    for frame in suspended_frames(coroutine)[: -INNERMOST - 1 : -1]:
        module: str = frame.f_globals.get("__name__", "")
        find = _FINDERS.get(module) or _FINDERS.get(module.partition(".")[0])
        if find is not None:
            found = _connection(find(frame.f_locals))
            if found is not None:
                return found
    return None


def suspended_frames(coroutine: Any) -> list[FrameType]:
    """Return the frames of a suspended coroutine and of those that it awaits, outermost first."""
    frames: list[FrameType] = []
    for _ in range(DEPTH):
        frame = _frame(coroutine)
        if frame is not None:
            frames.append(frame)
        coroutine = _next(coroutine)
        if coroutine is None:
            break
    return frames


def _frame(coroutine: Any) -> FrameType | None:
    for name in ("cr_frame", "ag_frame", "gi_frame"):
        frame = getattr(coroutine, name, None)
        if isinstance(frame, FrameType):
            return frame
    return None


def _next(coroutine: Any) -> Any:
    for name in ("cr_await", "ag_await", "gi_yieldfrom"):
        if hasattr(coroutine, name):
            return getattr(coroutine, name)
    if type(coroutine).__name__ in ("async_generator_asend", "async_generator_athrow"):
        # one step of an asynchronous generator, which alone knows whose
        return next((found for found in gc.get_referents(coroutine) if hasattr(found, "ag_await")), None)
    return None


def _connection(holder: Any) -> Any:
    """Return the transport, socket or descriptor to which the holder's attributes lead."""
    for _ in range(4):
        if isinstance(holder, int) or hasattr(holder, "get_extra_info") or hasattr(holder, "getsockopt"):
            return holder
        for name in _HOLDERS:
            inner = getattr(holder, name, None)
            if inner is not None:
                holder = inner
                break
        else:
            return None
    return None
