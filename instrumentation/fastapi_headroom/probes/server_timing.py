"""``Server-Timing`` on demand: the ledger of a request in its own response, for browsers' developer tools.

The header leaves with the start of the response, so it holds what was known then: the stages up to there, in
milliseconds. What streaming the body takes is not in it. Which class of exchange serves requests is chosen once, by
``exchange_class``: an app that did not ask for the header runs no line of this file.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable
from time import perf_counter
from typing import ClassVar, Final

from fastapi_headroom.ledger import ACCEPT_QUEUE, CACHE, DB, ON_LOOP, OTHER, STAGES, Ledger
from fastapi_headroom.probes.exchange import Exchange, Message
from fastapi_headroom.probes.headers import header
from fastapi_headroom.settings import Settings

REQUEST_HEADER: Final = b"x-headroom-timing"
"""The header that shows the secret."""
RESPONSE_HEADER: Final = b"server-timing"


def exchange_class(settings: Settings) -> type[Exchange]:
    """Return the class that serves requests under these settings."""
    if settings.server_timing == "always":
        return TimedExchange
    if secret := settings.server_timing_secret.get_secret_value():
        # A class of its own per secret: what every request of an app shares is no argument of each.
        return type("SecretTimedExchange", (SecretTimedExchange,), {"__slots__": (), "secret": secret.encode()})
    return Exchange


class TimedExchange(Exchange):
    """An exchange whose response tells where the time went."""

    __slots__ = ()

    def send(self, message: Message) -> Awaitable[None]:
        """Hand a message to the server, the start of a response with one header more."""
        if message.get("type") == "http.response.start":
            try:
                if self._asked():
                    headers = message.get("headers") or ()
                    if type(headers) is not list:  # what can be read once only is read here, and handed on as a list
                        headers = list(headers)
                        message = {**message, "headers": headers}
                    message = {**message, "headers": [*headers, (RESPONSE_HEADER, describe(self.ledger))]}
            except Exception as error:
                self._guard.failed(error)
        return Exchange.send(self, message)

    def _asked(self) -> bool:
        return True


class SecretTimedExchange(TimedExchange):
    """The same for clients that show the secret."""

    __slots__ = ()
    secret: ClassVar[bytes] = b""

    def _asked(self) -> bool:
        shown = header(self._scope["headers"], REQUEST_HEADER)
        return shown is not None and hmac.compare_digest(shown, self.secret)


def describe(ledger: Ledger) -> bytes:
    """Return the value of the header: stages with time in milliseconds, and ``total``, all as of now."""
    now = perf_counter()
    seconds = list(ledger.seconds)
    open_since = max(0.0, now - ledger.mark)
    if ledger.stepping:
        seconds[ON_LOOP] += open_since
    else:  # sent from outside the request's own steps, as from another thread
        waits = tuple(ledger.waits)  # a thread may close one meanwhile
        for stage in waits:
            seconds[stage] += open_since / len(waits)
    total = now - ledger.started
    seconds[OTHER] = max(0.0, total - sum(seconds) + seconds[ACCEPT_QUEUE] + seconds[OTHER])
    notes = {DB: _counted(ledger.queries, "query", "queries"), CACHE: _counted(ledger.cache_calls, "call", "calls")}
    parts = []
    for stage, name in enumerate(STAGES):
        note = notes.get(stage, "")
        milliseconds = f"{seconds[stage] * 1000:.2f}"
        if note or milliseconds != "0.00":
            parts.append(f"{name};dur={milliseconds}{note}")
    parts.append(f"total;dur={total * 1000:.2f}")
    return ", ".join(parts).encode()


def _counted(number: int, one: str, many: str) -> str:
    return f';desc="{number} {one if number == 1 else many}"' if number else ""
