"""Put the exporter together from settings: reader, pollers, collector and server."""

from __future__ import annotations

import contextlib

from fastapi_headroom.exporter.access import Access
from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.pollers import PolledCache, PolledQueue
from fastapi_headroom.exporter.pool_advisor import PoolAdvisor
from fastapi_headroom.exporter.scrape import Scraper
from fastapi_headroom.exporter.server import MetricsServer
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.exemplars import ExemplarReader
from fastapi_headroom.store.reader import Reader


class Exporter:
    """Serves the store that the settings name. Listens when constructed, answers after :meth:`start`.

    Raises PortInUseError when the port is taken, HeadroomError when the address cannot be listened on,
    or a file of a token, certificate or key cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        directory = settings.store_directory
        access = Access(settings)
        self._queues = [PolledQueue(url) for url in settings.queues]
        self._caches = [PolledCache(url) for url in settings.cache_servers]
        self._reader = Reader(directory)
        self._pools = PoolAdvisor(directory)
        collector = Collector(
            self._reader,
            expected_workers=settings.expected_workers,
            queues=self._queues,
            caches=self._caches,
            pools=self._pools,
        )
        self._scraper = Scraper(collector, ExemplarReader(directory))
        self._server = MetricsServer(settings.host, settings.port, self._scraper, directory, access)

    @property
    def url(self) -> str:
        """The address of the metrics."""
        return self._server.url

    @property
    def alive(self) -> bool:
        """Whether connections are accepted; False before the start, after the stop and after an accident."""
        return self._server.alive

    def start(self) -> None:
        """Answer requests, poll queues and cache servers and watch pools, on daemon threads."""
        for server in (*self._queues, *self._caches):
            server.start()
        self._pools.start()
        self._server.start()

    def stop(self) -> None:
        """Stop all, free the port and let go of the store's files. Idempotent."""
        for server in (*self._queues, *self._caches):
            server.stop()
        self._pools.stop()
        self._server.stop()
        with self._scraper.quiet:
            self._scraper.stopped = True
            self._reader.close()

    def abandon(self) -> None:
        """Close what a forked child inherited; the parent goes on serving."""
        self._server.abandon()
        with contextlib.suppress(OSError, RuntimeError):  # the fork may have caught the reader at work
            self._reader.close()
