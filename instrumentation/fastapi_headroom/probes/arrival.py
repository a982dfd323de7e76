"""When a request arrived, which may be long before the app is called: ``accept_queue``.

Two can tell, and the earlier of them is believed, for the client waited since then:

* the kernel: a request that comes while the loop is held lies in its socket, and of a new connection also in the
  listener's queue; the kernel knows how long ago the last data came. It is asked only when the loop was held lately,
  and reaches no further back than to the hold: before it, the request would have been read. Of a body that comes
  after its request the time is that of the body's last part, so the wait may come out too short, never too long.
* ``X-Request-Start``, set by a proxy: the time since the request reached the proxy, by two clocks. What lies in the
  future or more than OLDEST ago is a clock or a unit gone wrong, and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from time import time
from typing import Any, Final

from fastapi_headroom import holds
from fastapi_headroom.ledger import ACCEPT_QUEUE, Ledger
from fastapi_headroom.sockets import seconds_since_data

HEADER: Final = b"x-request-start"
OLDEST: Final = 600.0
"""Seconds for which a request may have been on its way."""
_VALUE: Final = re.compile(rb"\s*(?:t\s*=\s*)?(\d{9,20}(?:\.\d{1,9})?)\s*", re.IGNORECASE)
_UNITS: Final = (1e-9, 1e-6, 1e-3, 1.0)


def note(ledger: Ledger, scope: Any, receive: Callable[..., Any], trusts_header: bool) -> None:
    """Write the wait before the app was called to the ledger, if there was one. Never raises."""
    try:
        waited = 0.0
        if trusts_header:
            for key, value in scope["headers"]:
                if key == HEADER:
                    waited = since_proxy(value, time())
                    break
        if ledger.started < holds.until:
            waited = max(waited, since_arrival(receive, ledger.started))
        if waited > 0.0:
            ledger.seconds[ACCEPT_QUEUE] = waited
            ledger.waited = True
    except Exception:  # a server or client with surprising objects: as if nothing was known
        pass


def since_arrival(receive: Callable[..., Any], now: float) -> float:
    """Return how long the request lay in its socket while the loop was held; 0 when the server's is not reachable."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)  # uvicorn, with httptools and with h11
    of_loop = holds.of_running_loop()
    if transport is None or of_loop is None:
        return 0.0
    waited = seconds_since_data(transport)
    if waited is None or waited < holds.LONG:
        return 0.0
    return max(0.0, min(waited, now - of_loop.earliest))


def since_proxy(value: bytes, now: float) -> float:
    """Return the seconds since a time of the header: ``t=1700000000.123``, or in ms, us or ns; 0 when absurd."""
    match = _VALUE.fullmatch(value)
    if match is None:
        return 0.0
    moment = float(match[1])
    for unit in _UNITS:
        if 0.0 < now - moment * unit <= OLDEST:
            return now - moment * unit
    return 0.0
