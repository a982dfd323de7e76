"""One connection to a Redis that holds queues."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from fastapi_headroom.errors import MissingExtraError
from fastapi_headroom.probes.queue_adapters.redis_sentinel import MasterFinder
from fastapi_headroom.probes.queue_adapters.url import QueueURL, unusable

PORT: Final = 6379
TIMEOUT: Final = 1.0
"""Seconds to wait for a connection or a reply."""
SYSTEM: Final = "redis"
"""``messaging_system`` of everything that lies in a Redis."""
ALL: Final = "_all"
"""Label value for what a broker keeps for all queues, or all priorities, together."""

Command = tuple[str | bytes, ...]


class RedisLink:
    """Asks a Redis many things in one round trip.

    It talks through a bare ``redis`` connection and not through a client object, so that the cache probe does
    not count the poll as the app's cache traffic. Where sentinels are named, each connection goes to the master that
    they tell; a master that no longer is one hangs up on its clients, or does not answer.
    """

    def __init__(self, url: QueueURL, example: str) -> None:
        """Prepare to connect (nothing is opened yet). Raises MissingExtraError without redis-py and SettingsError
        for an address that it does not take."""
        try:
            from redis.backoff import NoBackoff
            from redis.connection import ConnectionPool
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("redis", "redis", "Polling Redis") from error
        options = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "retry": Retry(NoBackoff(), 0)}
        try:
            self._pool = ConnectionPool.from_url(url.broker, **options)
        except ValueError:  # its text may hold a part of the password
            raise unusable(example) from None
        self._connection: Any = None  # redis-py's connections are untyped
        self._finder = (
            MasterFinder(url.sentinels, partial(self._pool.connection_class, **options)) if url.sentinels else None
        )

    def ask(self, commands: list[Command]) -> list[Any]:
        """Send all commands at once and return the replies in their order; one that Redis refuses is an exception
        in its place. Raises redis.RedisError when Redis does not answer."""
        if not commands:
            return []
        from redis.exceptions import ResponseError

        connection = self._connection or self._new()
        self._connection = connection
        try:
            connection.connect()  # does nothing when it is connected
            connection.send_packed_command(connection.pack_commands(commands))
            replies: list[Any] = []
            for _ in commands:
                try:
                    replies.append(connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    replies.append(error)  # the replies behind it still have to be read
        except BaseException:
            self.close()  # replies that were not read would answer the next poll
            raise
        return replies

    def _new(self) -> Any:
        connection: Any = self._pool.make_connection()
        if self._finder is not None:
            connection.host, connection.port = self._finder.find()
        return connection

    def get(self, commands: list[Command]) -> list[Any]:
        """Return the replies as ``ask`` does, but raise the first one that is an error."""
        replies = self.ask(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def close(self) -> None:
        """Close the connection. Idempotent; the next question opens it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
