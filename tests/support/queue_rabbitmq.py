"""What the kinds of queues on RabbitMQ share in the kit."""

from __future__ import annotations

import amqp


def remove_queues(port: int, *names: str) -> None:
    """Delete queues that another library may have declared in its own way. One that is not there is no error."""
    with amqp.Connection(f"127.0.0.1:{port}") as connection:
        channel = connection.channel()
        for name in names:
            channel.queue_delete(name)
