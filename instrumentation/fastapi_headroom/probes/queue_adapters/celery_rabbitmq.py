"""Celery on RabbitMQ: how many jobs are ready, and how many consumers a queue has (each Celery worker is one).

What was delivered and not acknowledged has no series, nor has the age of what is ready (see ``rabbitmq_link``):
``headroom_queue_wait_seconds``, which workers measure, tells how long jobs lay. A job with an ``eta`` is ready until
a worker fetches it and waits for its time; it is not seen then.
"""

from __future__ import annotations

from typing import ClassVar, Self

from fastapi_headroom import catalog
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.rabbitmq_link import ALL, SYSTEM, RabbitMQLink, parse_amqp
from fastapi_headroom.probes.queue_adapters.url import QueueURL


class CeleryRabbitMQPoller:
    """Reads ready messages and consumers of queues."""

    example: ClassVar[str] = "celery+amqp://user:password@host:5672/vhost?queues=mail,reports"
    extra: ClassVar[str] = "celery"

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url`` (no connection is made yet)."""
        self.name = url.name
        self._queues = url.queues
        self._link = RabbitMQLink(url, self.extra)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Return the poller for ``celery+amqp[s]://user:password@host:port/vhost?queues=a,b``."""
        return cls(parse_amqp(url, cls.example))

    def poll(self) -> list[Sample]:
        """Return depth and consumers per queue; one that does not exist has none.

        Raises OSError or amqp.AMQPError when the broker does not answer or refuses.
        """
        samples: list[Sample] = []
        for queue in self._queues:
            if (state := self._link.ask(queue)) is not None:
                samples.append((catalog.QUEUE_DEPTH, (SYSTEM, queue, ALL), float(state[0])))
                samples.append((catalog.QUEUE_CONSUMERS, (SYSTEM, queue, ALL), float(state[1])))
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
