"""The URLs that name the queues to poll: ``KIND+BROKER://[user:password@]host:port/db?queues=a,b``.

With ``sentinel=NAME`` the host of a Redis is that of its sentinels, one or several with commas between them.

Errors show no part of a URL but its scheme and the names of its parameters: the rest may hold a password.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlunsplit

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.queue_adapters import redis_sentinel
from fastapi_headroom.probes.queue_adapters.redis_sentinel import Sentinels, sentinels_of
from fastapi_headroom.urls import split


@dataclass(frozen=True, slots=True)
class QueueURL:
    """A queue URL taken apart."""

    broker: str
    """The broker's own URL, such as ``redis://user:password@host:6379/0``."""
    name: str
    """What is polled, for log lines, without credentials."""
    queues: tuple[str, ...]
    """The queues that are named, without doubles; may be empty."""
    parameters: dict[str, str]
    """The other parameters."""
    sentinels: Sentinels | None = None
    """Who tells where the broker is; ``broker`` has a host of no meaning then."""


def parse(url: str, example: str, port: int, parameters: tuple[str, ...] = ()) -> QueueURL:
    """Return the parts of a queue URL whose default port is ``port``.

    Raises SettingsError that shows ``example`` for a parameter other than ``queues`` and ``parameters``, or a
    host or port that cannot be used.
    """
    try:
        parts = split(url)
    except ValueError:  # its text may hold a part of the password
        raise unusable(example) from None
    kind, _, scheme = parts.scheme.partition("+")
    known = ("queues", *parameters, *(redis_sentinel.PARAMETERS if scheme in redis_sentinel.SCHEMES else ()))
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in given:
        if name not in known:
            raise SettingsError(f"queue URL has unknown parameter {name!r}; known are {', '.join(known)}")
    sentinels, place = sentinels_of(parts, given)
    try:
        at = sentinels.service if sentinels else f"{parts.hostname or 'localhost'}:{parts.port or port}"
    except ValueError:
        raise unusable(example) from None
    queues = tuple(dict.fromkeys(name for name in given.pop("queues", "").split(",") if name))
    broker = urlunsplit((scheme, place, parts.path, "", ""))
    return QueueURL(broker, f"{kind}+{scheme}://{at}{parts.path}", queues, given, sentinels)


def parse_named(url: str, example: str, port: int, parameters: tuple[str, ...] = ()) -> QueueURL:
    """Return the parts of a URL that has to name its queues. Raises SettingsError as ``parse`` does."""
    parsed = parse(url, example, port, parameters)
    if not parsed.queues:
        raise SettingsError(f"queue URL names no queue; it looks like {example}")
    return parsed


def unusable(example: str) -> SettingsError:
    """Return the error for a URL whose host or port cannot be used."""
    return SettingsError(f"queue URL has no usable host and port; it looks like {example}")
