"""One connection to a RabbitMQ that holds queues.

A passive ``queue.declare`` asks for one queue and changes nothing; the broker answers from counters. It tells the
messages that are ready, of all priorities together, and the consumers. AMQP shows neither the messages that were
delivered and not acknowledged nor the age of those that are ready (only taking them would).

It talks through ``amqp``, whatever client the task library itself has: that one is small and does nothing by itself.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote, urlsplit

from fastapi_headroom.errors import MissingExtraError
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse_named

PORT: Final = 5672
PORT_TLS: Final = 5671
CONNECT_TIMEOUT: Final = 1.0
"""Seconds to wait for a connection."""
TIMEOUT: Final = 5.0
"""Seconds to wait for a reply. A queue that is paging messages out answers late: a long queue is no broken one."""
SYSTEM: Final = "rabbitmq"
ALL: Final = "_all"


class RabbitMQLink:
    """Asks a RabbitMQ for queues, over one AMQP connection."""

    def __init__(self, url: QueueURL, extra: str) -> None:
        """Prepare to connect (nothing is opened yet). Raises MissingExtraError, which names ``extra``."""
        try:
            import amqp
        except ImportError as error:
            raise MissingExtraError("amqp", extra, "Polling queues on RabbitMQ") from error
        self._amqp: Any = amqp
        parts = urlsplit(url.broker)
        tls = parts.scheme == "amqps"
        self._options = {
            "host": f"{parts.hostname or 'localhost'}:{parts.port or (PORT_TLS if tls else PORT)}",
            "userid": unquote(parts.username or "guest"),
            "password": unquote(parts.password or "guest"),
            "virtual_host": unquote(parts.path.removeprefix("/")) or "/",
            "ssl": tls,
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": TIMEOUT,
            "write_timeout": TIMEOUT,
        }
        self._connection: Any = None
        self._channel: Any = None

    def ask(self, queue: str) -> tuple[int, int] | None:
        """Return a queue's ready messages and consumers, None where there is no such queue.

        Raises OSError or amqp.AMQPError when the broker does not answer or refuses.
        """
        try:
            answer = self._open().queue_declare(queue, passive=True)
        except self._amqp.NotFound:
            self._channel = None  # the broker closes the channel with this answer
            return None
        except BaseException:
            self.close()
            raise
        return answer.message_count, answer.consumer_count

    def close(self) -> None:
        """Close the connection. Idempotent; the next question opens it again."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            try:
                connection.close()
            except Exception:  # it is gone already
                pass

    def _open(self) -> Any:
        if self._connection is None:
            connection = self._amqp.Connection(**self._options)
            connection.connect()
            self._connection = connection
        if self._channel is None:
            self._channel = self._connection.channel()
        return self._channel


def parse_amqp(url: str, example: str) -> QueueURL:
    """Return the parts of a URL of a kind such as ``celery+amqp[s]://``, which has to name its queues."""
    tls = url.partition(":")[0].endswith("amqps")
    return parse_named(url, example, PORT_TLS if tls else PORT)
