"""Dramatiq on RabbitMQ: ready messages, dead letters, and consumers: each worker process is one per queue.

What was delivered and not acknowledged has no series, nor has the age of what is ready (see ``rabbitmq_link``).
Nor have delayed messages: workers load them from their queue ``NAME.DQ`` into memory, where the broker does not count
them. Dead letters lie in ``NAME.XQ``, which nobody consumes, for a week.
"""

from __future__ import annotations

from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.queue_adapters.base import Sample
from fastapi_headroom.probes.queue_adapters.rabbitmq_link import ALL, SYSTEM, RabbitMQLink, parse_amqp
from fastapi_headroom.probes.queue_adapters.url import QueueURL

EXAMPLE: Final = "dramatiq+amqp://user:password@host:5672/vhost?queues=default,mail"


class DramatiqRabbitMQPoller:
    """Reads ready and dead messages and consumers of queues."""

    def __init__(self, url: QueueURL) -> None:
        """Prepare to poll the queues of ``url`` (no connection is made yet)."""
        self.name = url.name
        self._queues = url.queues
        self._link = RabbitMQLink(url, "dramatiq")

    @classmethod
    def from_url(cls, url: str) -> DramatiqRabbitMQPoller:
        """Return the poller for ``dramatiq+amqp[s]://user:password@host:port/vhost?queues=a,b``."""
        return cls(parse_amqp(url, EXAMPLE))

    def poll(self) -> list[Sample]:
        """Return the state of every queue; one that does not exist has none.

        Raises OSError or amqp.AMQPError when the broker does not answer or refuses.
        """
        samples: list[Sample] = []
        for queue in self._queues:
            labels = (SYSTEM, queue, ALL)
            if (state := self._link.ask(queue)) is not None:
                samples.append((catalog.QUEUE_DEPTH, labels, float(state[0])))
                samples.append((catalog.QUEUE_CONSUMERS, labels, float(state[1])))
            if (dead := self._link.ask(f"{queue}.XQ")) is not None:
                samples.append((catalog.QUEUE_FAILED, labels, float(dead[0])))
        return samples

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
