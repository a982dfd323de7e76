"""Poll brokers and cache servers from the exporter, so that their state is there when every app and worker is down.

Each URL has a thread of its own, and the scrape takes its last result: a slow or dead server delays neither scrapes
nor the other pollers. A server that is down is a gap and ``headroom_probe_up{probe="queue"}`` (or ``cache``) 0.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar
from urllib.parse import SplitResult, parse_qsl, unquote

from fastapi_headroom.errors import HeadroomError, MissingExtraError
from fastapi_headroom.probes.queue_adapters import Poller, Sample, poller_for
from fastapi_headroom.urls import split

log = logging.getLogger("fastapi_headroom")

INTERVAL = 1.0
"""Seconds between two polls of one broker."""
FRESH = 10.0
"""Seconds for which a result counts; after that a poll that hangs is a failure."""


class PolledQueue:
    """One queue URL, polled once a second on a daemon thread."""

    probe: ClassVar[str] = "queue"
    """The stem that is down while the server does not answer."""
    _server: ClassVar[str] = "queue broker"
    _lack: ClassVar[str] = "its queues are missing"
    _named_by: ClassVar[str] = "HEADROOM_QUEUES or --queue"

    def __init__(self, url: str, make: Callable[[str], Poller] = poller_for, *, interval: float = INTERVAL) -> None:
        self.url, self._make, self._interval = url, make, interval
        self._rows: list[Sample] = []
        self._polled_at = time.monotonic()
        self._up: bool | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"headroom-{self.probe}-poller", daemon=True)

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling; does not wait for a poll that is under way."""
        self._stop.set()

    @property
    def up(self) -> bool | None:
        """Whether the broker answers; None before the first answer or failure."""
        if self._up and time.monotonic() - self._polled_at > FRESH:
            return False
        return self._up

    def rows(self) -> list[Sample]:
        """Return the last result; nothing while the broker does not answer."""
        return self._rows if self.up else []

    def _run(self) -> None:
        poller: Poller | None = None
        while not self._stop.is_set():
            try:
                poller = poller or self._make(self.url)
                rows = poller.poll()
            except Exception as error:
                self._failed(error)
            else:
                self._answered(rows)
            self._stop.wait(self._interval)
        if poller is not None:
            poller.close()

    def _answered(self, rows: list[Sample]) -> None:
        if self._up is False:
            log.warning("fastapi-headroom: the %s %s answers again", self._server, public(self.url))
        self._rows, self._polled_at, self._up = rows, time.monotonic(), True

    def _failed(self, error: Exception) -> None:
        if self._up is not False:
            text = _without_credentials(str(error), self.url)
            if isinstance(error, MissingExtraError):
                cause, remedy = text, ""
            elif isinstance(error, HeadroomError):
                cause, remedy = text, f" until {self._named_by} is right"
            else:
                cause = f"{type(error).__name__}: {text}"
                remedy = f" until it answers: check that it runs and that the URL in {self._named_by} is right"
            log.warning(
                "fastapi-headroom: the %s %s cannot be polled (%s); %s%s",
                self._server, public(self.url), cause, self._lack, remedy,
            )  # fmt: skip
        self._up = False
        self._rows = []


def cache_poller_for(url: str) -> Poller:
    """Return the poller for a cache server's URL; what knows such servers is imported where there are any."""
    from fastapi_headroom.exporter import cache_servers

    return cache_servers.cache_poller_for(url)


class PolledCache(PolledQueue):
    """One cache server, polled once a second on a daemon thread."""

    probe: ClassVar[str] = "cache"
    _server: ClassVar[str] = "cache server"
    _lack: ClassVar[str] = "its memory and evictions are missing"
    _named_by: ClassVar[str] = "HEADROOM_CACHE_SERVERS or --cache"

    def __init__(
        self, url: str, make: Callable[[str], Poller] = cache_poller_for, *, interval: float = INTERVAL
    ) -> None:
        super().__init__(url, make, interval=interval)


def up(polled: Sequence[PolledQueue]) -> dict[str, bool]:
    """Return by probe whether all its servers answer; nothing of a probe while that is not known of any."""
    states: dict[str, bool] = {}
    for one in polled:
        if one.up is not None:
            states[one.probe] = one.up and states.get(one.probe, True)
    return states


def public(url: str) -> str:
    """Return a URL without user, password, path parameters and query: fit for a log. There may be several hosts."""
    try:
        parts = split(url)
        hosts = ",".join(_host(text) for text in parts.netloc.rpartition("@")[2].split(","))
    except ValueError:
        return "(a URL that cannot be parsed)"
    return f"{parts.scheme}://{hosts}{parts.path}"


def _host(text: str) -> str:
    """Return host and port as they are shown. Raises ValueError for a port that is none: it may be a password."""
    parts = SplitResult("", text, "", "", "")
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
    return host if parts.port is None else f"{host}:{parts.port}"


def _without_credentials(text: str, url: str) -> str:
    try:
        parts = split(url)
        secrets = [parts.netloc.rpartition("@")[0], parts.password or "", unquote(parts.password or "")]
        secrets += [value for name, value in parse_qsl(parts.query) if name.endswith("password")]
    except ValueError:
        return "(details withheld)"
    line = " ".join(text.split())
    for secret in filter(None, secrets):
        line = line.replace(secret, "***")
    return line
