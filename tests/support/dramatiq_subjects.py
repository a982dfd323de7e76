"""Dramatiq as the queue kit sees it."""

from __future__ import annotations

import dramatiq
from dramatiq.broker import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from demo_app.stack.servers import RabbitMQ
from fastapi_headroom import catalog
from tests.support import dramatiq_app
from tests.support.queue_kit import PYTHON
from tests.support.queue_rabbitmq import remove_queues
from tests.support.queue_redis import OnRedis

DEPTH, AGE, FAILED = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE, catalog.QUEUE_FAILED
BUSY, CONSUMERS, DELAYED = catalog.QUEUE_IN_PROGRESS, catalog.QUEUE_CONSUMERS, catalog.QUEUE_DELAYED


class DramatiqOnRedis(OnRedis):
    """Dramatiq with its own worker."""

    kind = "dramatiq"
    measures = True
    tells_due = False
    grace = 0.2  # it looks for its end once a second
    sees = frozenset({DEPTH, AGE, BUSY, DELAYED, FAILED})

    def start(self) -> None:
        """Begin with an empty Redis."""
        super().start()
        self.connect()

    def connect(self) -> None:
        """Make the actors publish to this broker."""
        self.forget()
        made = dramatiq_app.broker_for(self.server.url)  # type: ignore[attr-defined]
        for actor in (dramatiq_app.kit, dramatiq_app.sleep, dramatiq_app.old):
            actor.broker = made
            made.declare_actor(actor)

    @property
    def library(self) -> Broker:
        """Dramatiq's broker."""
        return dramatiq.get_broker()

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Send."""
        for _ in range(count):
            dramatiq_app.kit.send(str(self.folder), kind)

    def publish_later(self, seconds: float) -> None:
        """Send with a delay."""
        dramatiq_app.kit.send_with_options(args=(str(self.folder), "count"), delay=int(seconds * 1000))

    def truth(self) -> int:
        """Count the ids one by one."""
        return len(self.client.lrange("dramatiq:mail", 0, -1))

    def purge(self) -> None:
        """Flush as an operator does."""
        self.library.flush("mail")

    def forget(self) -> None:
        """Close the connections."""
        self.library.close()

    def environment(self) -> dict[str, str]:
        """Point the worker at this broker, let it fetch no more than it runs, and look for its end often."""
        return super().environment() | {
            "TEST_BROKER_URL": self.server.url,  # type: ignore[attr-defined]
            "dramatiq_queue_prefetch": "1",
            "dramatiq_worker_timeout": "100",
        }

    def worker_command(self) -> list[str]:
        """Run Dramatiq's worker, one message at a time."""
        return [
            PYTHON, "-m", "dramatiq", "tests.support.dramatiq_app", "--processes", "1", "--threads", "1",
            "--queues", "mail", "--worker-shutdown-timeout", "2000",
        ]  # fmt: skip


class DramatiqOnRabbitMQ(DramatiqOnRedis):
    """The same on RabbitMQ."""

    system = "rabbitmq"
    broker = RabbitMQ  # type: ignore[assignment]
    sees = frozenset({DEPTH, CONSUMERS, FAILED})

    def start(self) -> None:
        """Let Dramatiq declare the queues anew."""
        remove_queues(self.server.port, "mail", "mail.DQ", "mail.XQ")
        self.connect()
        self.library.declare_queue("mail", ensure=True)  # type: ignore[call-arg]

    def forget(self) -> None:
        """Drop the connection: a closed one is not opened again."""
        if isinstance(self.library, RabbitmqBroker):
            del self.library.connection

    def truth(self) -> int:
        """Ask Dramatiq."""
        return int(self.library.get_queue_message_counts("mail")[0])  # type: ignore[attr-defined]
