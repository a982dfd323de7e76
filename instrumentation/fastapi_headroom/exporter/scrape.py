"""One scrape at a time: collect, render and compress, shared by everyone who waited for it."""

from __future__ import annotations

import gzip
import threading
import time

from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.exposition import Renderer
from fastapi_headroom.store.exemplars import ExemplarReader
from fastapi_headroom.store.reader import Family

_GZIP_LEVEL = 1  # exposition text shrinks tenfold at the cheapest level already


class StoppedError(Exception):
    """The exporter ended while this scrape waited for its turn."""


class Scraper:
    """Serialises scrapes around the reader. A scrape that began while others waited serves them all, so a
    crowd of scrapers costs about as much as two."""

    def __init__(self, collector: Collector, exemplars: ExemplarReader | None = None) -> None:
        self.collector = collector
        self._exemplars = exemplars
        self.last: float | None = None
        """When the last scrape ended, in seconds since 1970."""
        self._renderer = Renderer()
        self.quiet = threading.Lock()
        """Held while a scrape reads the store."""
        self._families: list[Family] = []
        self._bodies: dict[tuple[bool, bool], bytes] = {}
        self._began = -1.0
        self.stopped = False
        """Set while ``quiet`` is held: a scrape that waits for its turn would open files that nobody closes."""
        self.failing = False
        """Whether the last scrape failed, so that a fault that lasts is logged once."""

    def scrape(self, *, openmetrics: bool = False, compressed: bool = False) -> bytes:
        """Return a body that is no older than this call. Raises StoppedError."""
        called = time.monotonic()
        with self.quiet:
            if self.stopped:
                raise StoppedError
            if self._began < called:
                self._collect(openmetrics)
            return self._body(openmetrics, compressed)

    def _collect(self, openmetrics: bool) -> None:
        began = time.monotonic()
        self._families = self.collector.collect()
        self._bodies.clear()
        self._body(openmetrics, False)
        self._began = began
        self.collector.scrape_seconds = time.monotonic() - began
        self.last = time.time()

    def _body(self, openmetrics: bool, compressed: bool) -> bytes:
        key = (openmetrics, compressed)
        body = self._bodies.get(key)
        if body is None:
            if compressed:
                body = gzip.compress(self._body(openmetrics, False), _GZIP_LEVEL, mtime=0)
            else:
                exemplars = self._exemplars.read() if openmetrics and self._exemplars else {}
                body = self._renderer.render(self._families, openmetrics=openmetrics, exemplars=exemplars)
            self._bodies[key] = body
        return body
