"""The state of cache servers as they tell it themselves: ``INFO`` of Redis and those that speak its protocol.

What a server counts is of all its clients and databases together, so it stands in series of its own beside what the
app's clients were answered. ``INFO`` is one round trip, and the same work for the server however much it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import parse_qsl, urlunsplit

from fastapi_headroom import catalog
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.exporter.key_samples import MOST, KeySampler
from fastapi_headroom.exporter.memcached_server import MemcachedPoller
from fastapi_headroom.probes.queue_adapters import Poller, Sample
from fastapi_headroom.probes.queue_adapters.redis_link import PORT, Command, RedisLink
from fastapi_headroom.probes.queue_adapters.redis_sentinel import sentinels_of
from fastapi_headroom.probes.queue_adapters.url import QueueURL
from fastapi_headroom.urls import scheme_of, split

EXAMPLE: Final = "redis://host:6379/0?name=main&sample=20"
SECTIONS: Final = ("server", "clients", "memory", "stats", "keyspace")
_ASK: Final[list[Command]] = [("INFO", section) for section in SECTIONS]


class RedisServerPoller:
    """Reads what a Redis, Valkey, KeyDB or Dragonfly says of itself."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll. ``url.name`` is the cache's name on the boards."""
        self.name = url.name
        self._link = RedisLink(url, EXAMPLE)
        keys = int(url.parameters.get("sample", "0"))
        self._sampler = KeySampler(url.name, keys) if keys else None

    @classmethod
    def from_url(cls, url: str) -> RedisServerPoller:
        """Return the poller for ``redis://[user:password@]host:port/db[?name=NAME&sample=KEYS]``, ``rediss://`` or ``unix://``."""
        return cls(_parse(url))

    def poll(self) -> list[Sample]:
        """Return the samples of now. Raises redis.RedisError."""
        facts: dict[str, str] = {}
        for reply in self._link.get(_ASK):
            facts |= parse_info(reply)
        rows = samples(self.name, facts)
        return rows + self._sampler.rows(self._link.ask) if self._sampler else rows

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


def parse_info(reply: bytes) -> dict[str, str]:
    """Return the fields of a reply to INFO. What is no ``name:value`` line is left out."""
    lines = reply.decode("utf-8", "replace").splitlines()
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon and name[:1] != "#"}


def samples(cache: str, facts: Mapping[str, str]) -> list[Sample]:
    """Return the rows that the fields of INFO make; a field that is not there, or no number, makes none."""
    rows: list[Sample] = []
    of = (cache,)
    for metric, labels, field in (
        (catalog.CACHE_MEMORY, of, "used_memory"),
        (catalog.CACHE_EVICTIONS, of, "evicted_keys"),
        (catalog.CACHE_EXPIRATIONS, of, "expired_keys"),
        (catalog.CACHE_CLIENTS, of, "connected_clients"),
        (catalog.CACHE_CLIENTS_LIMIT, of, "maxclients"),
        (catalog.CACHE_SERVER_LOOKUPS, (cache, "hit"), "keyspace_hits"),
        (catalog.CACHE_SERVER_LOOKUPS, (cache, "miss"), "keyspace_misses"),
    ):
        value = _number(facts.get(field, ""))
        if value is not None:
            rows.append((metric, labels, value))
    limit = _number(facts.get("maxmemory", ""))
    if limit:  # 0 is none
        rows.append((catalog.CACHE_MEMORY_LIMIT, of, limit))
    if "evicted_keys" in facts:  # the keyspace names no empty database
        rows.append((catalog.CACHE_ENTRIES, of, sum(_keys(value) for field, value in facts.items() if _is_db(field))))
    version = facts.get("valkey_version") or facts.get("redis_version")
    if version:
        server = facts.get("server_name") or "redis"
        about = (cache, server, version, facts.get("maxmemory_policy", ""))
        rows.append((catalog.CACHE_SERVER_INFO, about, 1.0))
    return rows


_BY_SCHEME: Final[dict[str, Callable[[str], Poller]]] = {
    **dict.fromkeys(("redis", "rediss", "unix"), RedisServerPoller.from_url),
    "memcached": MemcachedPoller.from_url,
}


def cache_poller_for(url: str) -> Poller:
    """Return the poller for the URL of a cache server, such as ``redis://host:6379/0?name=main``.

    Raises SettingsError for a URL that cannot be used and MissingExtraError when the client library is not
    installed. Does not connect yet.
    """
    scheme = scheme_of(url)
    if (make := _BY_SCHEME.get(scheme)) is None:
        # The scheme alone is shown: the rest of the URL may hold a password.
        raise SettingsError(
            f"cache server URL with scheme {scheme or '(none)'!r} cannot be polled; the schemes are "
            f"{', '.join(_BY_SCHEME)}, as in {EXAMPLE}"
        )
    return make(url)


def _parse(url: str) -> QueueURL:
    """Return the parts of a server's URL; its name is what the parameter says, or where the server is.

    The default is the name that the app's clients get by themselves.
    """
    try:
        parts = split(url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        sentinels, place = sentinels_of(parts, given)
        host = sentinels.service if sentinels else f"{parts.hostname or 'localhost'}:{parts.port or PORT}"
    except ValueError:  # its text may hold a part of the password
        raise SettingsError(f"cache server URL has no usable host and port; it looks like {EXAMPLE}") from None
    named = given.pop("name", "")
    sample = given.pop("sample", "0")
    if not (sample.isascii() and sample.isdigit() and len(sample) <= 3 and int(sample) <= MOST):
        raise SettingsError(f"cache server URL asks for no number of keys from 0 to {MOST}; it looks like {EXAMPLE}")
    database = given.get("db", "0") if parts.scheme == "unix" else parts.path.strip("/") or "0"
    for name in given.keys() - ({"db"} if parts.scheme == "unix" else set()):
        raise SettingsError(
            f"cache server URL has unknown parameter {name!r}; known are name, sample, sentinel and sentinel_password, "
            f"as in {EXAMPLE}"
        )
    if not database.isdigit():
        raise SettingsError(f"cache server URL names its database by no number; it looks like {EXAMPLE}")
    query = f"db={database}" if parts.scheme == "unix" else ""
    server = urlunsplit((parts.scheme, place, parts.path, query, ""))
    where = "unix" if parts.scheme == "unix" else host
    return QueueURL(server, named or f"{where}/{database}", (), {"sample": sample}, sentinels)


def _number(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() else None


def _is_db(field: str) -> bool:
    return field.startswith("db") and field[2:].isdigit()


def _keys(value: str) -> float:
    """Return the number in ``keys=5,expires=1,avg_ttl=0``."""
    pairs = dict(pair.split("=", 1) for pair in value.split(",") if "=" in pair)
    return _number(pairs.get("keys", "")) or 0.0
