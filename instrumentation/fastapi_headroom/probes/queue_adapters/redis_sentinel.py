"""A Redis that sentinels watch: they are asked where its master is, so that polls follow a failover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult

from fastapi_headroom.errors import SettingsError

PORT: Final = 26_379
PARAMETERS: Final = ("sentinel", "sentinel_password")
SCHEMES: Final = ("redis", "rediss")
EXAMPLE: Final = "redis://sentinel-1:26379,sentinel-2:26379/0?sentinel=mymaster"


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Who is asked for the master, and by which name it is known."""

    service: str
    addresses: tuple[tuple[str, int], ...]
    password: str | None = field(default=None, repr=False)
    """The sentinels' own; what the URL holds before the ``@`` is the master's."""


def sentinels_of(parts: SplitResult, given: dict[str, str]) -> tuple[Sentinels | None, str]:
    """Take the sentinels out of a URL and its parameters ``given``; return them, and the network location without.

    ``redis://user:password@a:26379,b/0?sentinel=mymaster``: the hosts are sentinels, their default port is 26379.
    Without the parameter there are none. Raises SettingsError for parameters that are of no use.
    """
    service = given.pop(PARAMETERS[0], None)
    password = given.pop(PARAMETERS[1], None)
    if service is None and password is None:
        return None, parts.netloc
    if not service or parts.scheme.rpartition("+")[2] not in SCHEMES:
        raise SettingsError(
            f"URL names sentinels without their master's name, or none of Redis; it looks like {EXAMPLE}"
        )
    login, at, hosts = parts.netloc.rpartition("@")
    addresses = tuple(_address(host) for host in hosts.split(","))
    return Sentinels(service, addresses, password or None), f"{login}{at}localhost"


def _address(text: str) -> tuple[str, int]:
    try:
        parts = SplitResult("", text, "", "", "")
        return parts.hostname or "localhost", parts.port or PORT
    except ValueError:
        raise SettingsError(f"URL names a sentinel of no usable host and port; it looks like {EXAMPLE}") from None


class MasterFinder:
    """Asks sentinels in turn, first of all the one that answered last."""

    def __init__(self, sentinels: Sentinels, connect: Callable[..., Any]) -> None:
        """Prepare to ask. ``connect`` makes a connection of redis-py from ``host``, ``port`` and ``password``."""
        self._service, self._password = sentinels.service, sentinels.password
        self._addresses = list(sentinels.addresses)
        self._connect = connect

    def find(self) -> tuple[str, int]:
        """Return host and port of the master. Raises redis.ConnectionError when no sentinel knows it."""
        from redis import exceptions

        said = []
        for number, (host, port) in enumerate(self._addresses):
            connection = self._connect(host=host, port=port, password=self._password)
            try:
                connection.connect()
                connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
                found = connection.read_response()
            except (exceptions.RedisError, OSError) as error:
                said.append(f"{host}:{port}: {error}")
                continue
            finally:
                connection.disconnect()
            if found is None:
                said.append(f"{host}:{port} knows no master {self._service!r}")
                continue
            self._addresses.insert(0, self._addresses.pop(number))
            return _text(found[0]), int(found[1])
        raise exceptions.ConnectionError("no sentinel tells where the master is: " + "; ".join(said))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
