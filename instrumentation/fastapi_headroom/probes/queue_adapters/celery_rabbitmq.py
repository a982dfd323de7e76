"""Celery on RabbitMQ: how many jobs are ready, and how many consumers a queue has.

A passive ``queue.declare`` asks for one queue and changes nothing; the broker answers from counters. It tells the
messages that are ready, of all priorities together, and the consumers: every Celery worker is one per queue.

AMQP shows neither the messages that were delivered and not acknowledged nor the age of those that are ready (only
taking them would), so there are no such series: ``headroom_queue_wait_seconds``, which workers measure, tells how
long jobs lay. A job with an ``eta`` is ready until a worker fetches it and waits for its time; it is not seen then.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote, urlsplit

from fastapi_headroom import catalog
from fastapi_headroom.errors import MissingExtraError
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.url import QueueURL, parse_named

EXAMPLE: Final = "celery+amqp://user:password@host:5672/vhost?queues=mail,reports"
PORT: Final = 5672
PORT_TLS: Final = 5671
CONNECT_TIMEOUT: Final = 1.0
"""Seconds to wait for a connection."""
TIMEOUT: Final = 5.0
"""Seconds to wait for a reply. A queue that is paging messages out answers late: a long queue is no broken one."""
SYSTEM: Final = "rabbitmq"
ALL: Final = "_all"


class CeleryRabbitMQPoller:
    """Reads ready messages and consumers of queues over one AMQP connection."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url`` (no connection is made yet)."""
        try:
            import amqp
        except ImportError as error:
            raise MissingExtraError("amqp", "celery", "Polling Celery queues on RabbitMQ") from error
        self._amqp: Any = amqp
        self.name = url.name
        self._queues = url.queues
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

    @classmethod
    def from_url(cls, url: str) -> CeleryRabbitMQPoller:
        """Return the poller for ``celery+amqp[s]://user:password@host:port/vhost?queues=a,b``."""
        return cls(parse_named(url, EXAMPLE, PORT_TLS if url.startswith("celery+amqps:") else PORT))

    def poll(self) -> list[Sample]:
        """Return depth and consumers per queue; one that does not exist has none.

        Raises OSError or amqp.AMQPError when the broker does not answer or refuses.
        """
        try:
            return [sample for queue in self._queues for sample in self._of_queue(queue)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection. Idempotent; the next poll opens it again."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            try:
                connection.close()
            except Exception:  # it is gone already
                pass

    def _of_queue(self, queue: str) -> list[Sample]:
        try:
            answer = self._open().queue_declare(queue, passive=True)
        except self._amqp.NotFound:
            self._channel = None  # the broker closes the channel with this answer
            return []
        labels = (SYSTEM, queue, ALL)
        return [
            (catalog.QUEUE_DEPTH, labels, float(answer.message_count)),
            (catalog.QUEUE_CONSUMERS, labels, float(answer.consumer_count)),
        ]

    def _open(self) -> Any:
        if self._connection is None:
            connection = self._amqp.Connection(**self._options)
            connection.connect()
            self._connection = connection
        if self._channel is None:
            self._channel = self._connection.channel()
        return self._channel
