"""The calls that block a thread, by kind: where they are, from how many seconds on they count, and what to use instead.

Each place is one that no other probe wraps: a wrap below or above another one could not be taken out alone.

Not here: ``open`` and the methods of files, which the watchdog finds (see ``file_calls``). Left to its cause ``io``:
drivers written in C that are used without SQLAlchemy; locks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final

from fastapi_headroom.thresholds import BLOCKING_CALL_SECONDS

REMEDIES: Final = {
    "sync_db": "use create_async_engine and await, a sync `def` endpoint, or run_in_threadpool",
    "sync_redis": "use redis.asyncio, a sync `def` endpoint, or run_in_threadpool",
    "sync_http": "use httpx.AsyncClient or aiohttp, a sync `def` endpoint, or run_in_threadpool",
    "sleep": "use await asyncio.sleep()",
    "subprocess": "use asyncio.create_subprocess_exec, or run_in_threadpool",
    "dns": "use await loop.getaddrinfo(), an async client, or run_in_threadpool",
    "file": "use run_in_threadpool, or anyio.Path",
}
"""What to do, by kind: the values of the label ``kind``."""
_YIELDS: Final = 0.001
"""Seconds up to which a sleep only gives way to other threads."""


@dataclass(frozen=True, slots=True)
class Place:
    """One function or method: ``attribute`` of a module or of a class in it."""

    kind: str
    module: str
    cls: str
    attribute: str
    least: float = 0.0
    """Seconds from which on a call counts. 0 for what waits for another machine or process's answer."""
    of_dialect: bool = False
    """A method of SQLAlchemy's dialects, whose async ones do not block."""

    @property
    def name(self) -> str:
        """The whole name."""
        return f"{self.module}.{self.cls}.{self.attribute}"

    def owner(self) -> Any:
        """Return the class or module that has the attribute, None when there is none. The module is imported."""
        module = sys.modules[self.module]
        if not self.cls:
            return module
        cls = getattr(module, self.cls, None)
        # A base class may have it: Python 3.13 keeps Path.read_bytes there.
        return next((base for base in getattr(cls, "__mro__", ()) if self.attribute in vars(base)), cls)


_SLOW: Final = BLOCKING_CALL_SECONDS
_DIALECT: Final = ("sqlalchemy.engine.default", "DefaultDialect")

PLACES: Final = (
    Place("sleep", "time", "", "sleep", _YIELDS),
    Place("dns", "socket", "", "getaddrinfo", _SLOW),
    Place("dns", "socket", "", "gethostbyname", _SLOW),
    Place("subprocess", "subprocess", "Popen", "communicate", _SLOW),
    Place("subprocess", "subprocess", "Popen", "wait", _SLOW),
    Place("subprocess", "os", "", "system", _SLOW),
    Place("file", "os", "", "fsync", _SLOW),
    Place("file", "shutil", "", "copyfile", _SLOW),
    *(
        Place("file", "pathlib", "Path", name, _SLOW)
        for name in ("read_bytes", "read_text", "write_bytes", "write_text")
    ),
    # http.client is below urllib, urllib3, requests and botocore, httpcore below httpx.
    Place("sync_http", "http.client", "HTTPConnection", "getresponse"),
    Place("sync_http", "httpcore", "ConnectionPool", "handle_request"),
    # Once per command or pipeline, whatever the number of replies.
    Place("sync_redis", "redis.connection", "AbstractConnection", "send_packed_command"),
    *(
        Place("sync_db", *_DIALECT, name, of_dialect=True)
        for name in ("connect", "do_execute", "do_executemany", "do_execute_no_params", "do_commit")
    ),
    # Where a sync pool's checkout waits.
    Place("sync_db", "sqlalchemy.util.queue", "Queue", "get", _SLOW),
)
