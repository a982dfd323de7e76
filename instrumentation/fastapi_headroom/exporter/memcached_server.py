"""The state of a memcached as it tells it itself: ``stats`` and ``stats settings``, in its text protocol."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from fastapi_headroom import catalog
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.queue_adapters import Sample

PORT: Final = 11211
EXAMPLE: Final = "memcached://host:11211?name=sessions"
TIMEOUT: Final = 1.0
"""Seconds to wait for a connection or a reply."""
_MOST: Final = 256 * 1024
"""Bytes that a reply may have: what sends more is no memcached."""


class MemcachedPoller:
    """Reads what a memcached says of itself, over one connection per poll."""

    def __init__(self, host: str, port: int, name: str) -> None:
        """Prepare to poll; ``name`` is the cache's name on the boards."""
        self.name = name
        self._address = (host, port)

    @classmethod
    def from_url(cls, url: str) -> MemcachedPoller:
        """Return the poller for ``memcached://host:port[?name=NAME]``. Raises SettingsError for what cannot be used."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "localhost", parts.port or PORT
        except ValueError:  # its text may hold a part of a password
            raise SettingsError(f"cache server URL has no usable host and port; it looks like {EXAMPLE}") from None
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        named = given.pop("name", "")
        for name in given:
            raise SettingsError(f"cache server URL has unknown parameter {name!r}; known is name, as in {EXAMPLE}")
        return cls(host, port, named or f"{host}:{port}")

    def poll(self) -> list[Sample]:
        """Return the samples of now. Raises OSError when it does not answer."""
        with socket.create_connection(self._address, TIMEOUT) as connection:
            connection.sendall(b"stats\r\nstats settings\r\n")
            reply = b""
            while reply.count(b"END\r\n") < 2:
                part = connection.recv(65_536)
                if not part or len(reply) > _MOST:
                    raise ConnectionError("it does not answer as a memcached does")
                reply += part
        stats, _, settings = reply.partition(b"END\r\n")
        return samples(self.name, parse_stats(stats), parse_stats(settings))

    def close(self) -> None:
        """Do nothing: no connection is kept."""


def parse_stats(reply: bytes) -> dict[str, str]:
    """Return the fields of replies to ``stats``."""
    words = (line.split(" ", 2) for line in reply.decode("utf-8", "replace").splitlines())
    return {line[1]: line[2] for line in words if len(line) == 3 and line[0] == "STAT"}


def samples(cache: str, facts: Mapping[str, str], settings: Mapping[str, str]) -> list[Sample]:
    """Return the rows that the fields make; a field that is not there, or no number, makes none."""
    of = (cache,)
    rows: list[Sample] = [
        (metric, labels, float(facts[field]))
        for metric, labels, field in (
            (catalog.CACHE_MEMORY, of, "bytes"),
            (catalog.CACHE_MEMORY_LIMIT, of, "limit_maxbytes"),
            (catalog.CACHE_EVICTIONS, of, "evictions"),
            (catalog.CACHE_ENTRIES, of, "curr_items"),
            (catalog.CACHE_CLIENTS, of, "curr_connections"),
            (catalog.CACHE_CLIENTS_LIMIT, of, "max_connections"),
            (catalog.CACHE_SERVER_LOOKUPS, (cache, "hit"), "get_hits"),
            (catalog.CACHE_SERVER_LOOKUPS, (cache, "miss"), "get_misses"),
        )
        if facts.get(field, "").isdecimal()
    ]
    if version := facts.get("version"):
        policy = "noeviction" if settings.get("evictions") == "off" else "lru"
        rows.append((catalog.CACHE_SERVER_INFO, (cache, "memcached", version, policy), 1.0))
    return rows
