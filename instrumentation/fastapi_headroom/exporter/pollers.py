"""Poll brokers from the exporter, so that queue depth is there when every app and worker is down.

Each queue URL has a thread of its own, and the scrape takes its last result: a slow or dead broker delays
neither scrapes nor the other queues. A broker that is down is a gap and ``headroom_probe_up{probe="queue"}`` 0.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import unquote, urlsplit

from fastapi_headroom.probes.queue_adapters import Poller, Sample, poller_for

log = logging.getLogger("fastapi_headroom")

INTERVAL = 1.0
"""Seconds between two polls of one broker."""
FRESH = 10.0
"""Seconds for which a result counts; after that a poll that hangs is a failure."""


class PolledQueue:
    """One queue URL, polled once a second on a daemon thread."""

    def __init__(self, url: str, make: Callable[[str], Poller] = poller_for, *, interval: float = INTERVAL) -> None:
        self.url, self._make, self._interval = url, make, interval
        self._rows: list[Sample] = []
        self._polled_at = time.monotonic()
        self._up: bool | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headroom-queue-poller", daemon=True)

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
            log.warning("fastapi-headroom: the queue broker %s answers again", public(self.url))
        self._rows, self._polled_at, self._up = rows, time.monotonic(), True

    def _failed(self, error: Exception) -> None:
        if self._up is not False:
            log.warning(
                "fastapi-headroom: the queue broker %s cannot be polled (%s: %s); its queues are missing until it "
                "answers: check that it runs and that the URL in HEADROOM_QUEUES or --queue is right",
                public(self.url),
                type(error).__name__,
                _without_credentials(str(error), self.url),
            )
        self._up = False
        self._rows = []


def up(queues: Sequence[PolledQueue]) -> bool | None:
    """Return whether all brokers answer; None while that is not known of any."""
    known = [queue.up for queue in queues if queue.up is not None]
    return all(known) if known else None


def public(url: str) -> str:
    """Return a URL without user, password, path parameters and query: fit for a log."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return "(a URL that cannot be parsed)"
    return f"{parts.scheme}://{host}{port}{parts.path}"


def _without_credentials(text: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        secrets = [parts.netloc.rpartition("@")[0], parts.password or "", unquote(parts.password or "")]
    except ValueError:
        return "(details withheld)"
    line = " ".join(text.split())
    for secret in filter(None, secrets):
        line = line.replace(secret, "***")
    return line
