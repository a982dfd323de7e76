"""TaskIQ on RabbitMQ (``taskiq-aio-pika``): ready messages and consumers, as for Celery there (``rabbitmq_link``).

Each worker process is one consumer per queue. Dead letters of all queues lie in ``taskiq.dead_letter``, and delayed
messages in a queue that the app names: either can be named here like any other.
"""

from __future__ import annotations

from typing import ClassVar

from fastapi_headroom.probes.queue_adapters.celery_rabbitmq import CeleryRabbitMQPoller


class TaskiqRabbitMQPoller(CeleryRabbitMQPoller):
    """Reads ready messages and consumers of queues."""

    example: ClassVar[str] = "taskiq+amqp://user:password@host:5672/vhost?queues=taskiq"
    extra: ClassVar[str] = "taskiq"
