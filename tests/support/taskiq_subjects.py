"""TaskIQ as the queue kit sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import amqp
from taskiq import AsyncBroker

from demo_app.stack.servers import RabbitMQ
from fastapi_headroom import catalog
from tests.support import taskiq_app
from tests.support.queue_kit import PYTHON
from tests.support.queue_rabbitmq import remove_queues
from tests.support.queue_redis import OnRedis

DEPTH, AGE = catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE
BUSY, CONSUMERS = catalog.QUEUE_IN_PROGRESS, catalog.QUEUE_CONSUMERS


class TaskiqList(OnRedis):
    """TaskIQ's list broker with its own worker."""

    kind = "taskiq"
    way: ClassVar[str] = "list"
    measures = True
    grace = 0.5
    sees = frozenset({DEPTH, AGE})

    def with_broker(self, use: Callable[[AsyncBroker], Awaitable[Any]]) -> Any:
        """Use a broker as an app does."""

        async def run() -> Any:
            broker = taskiq_app.broker_for(self.way, self.server.url)  # type: ignore[attr-defined]
            await broker.startup()
            try:
                return await use(broker)
            finally:
                await broker.shutdown()

        return asyncio.run(run())

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Kick."""

        async def kick(broker: AsyncBroker) -> None:
            for _ in range(count):
                await taskiq_app.kit.kicker().with_broker(broker).kiq(str(self.folder), kind)

        self.with_broker(kick)

    def truth(self) -> int:
        """Count the items one by one."""
        return len(self.client.lrange("mail", 0, -1))

    def environment(self) -> dict[str, str]:
        """Point the worker at this broker."""
        return super().environment() | {"TEST_BROKER_URL": self.server.url, "TEST_BROKER_KIND": self.way}  # type: ignore[attr-defined]

    def worker_command(self) -> list[str]:
        """Run TaskIQ's worker, one task at a time."""
        return [
            PYTHON, "-m", "taskiq", "worker", "tests.support.taskiq_app:broker", "--workers", "1",
            "--max-async-tasks", "1", "--max-prefetch", "0", "--ack-type", "when_executed",
        ]  # fmt: skip


class TaskiqStream(TaskiqList):
    """TaskIQ's stream broker."""

    way = "stream"
    sees = frozenset({DEPTH, AGE, BUSY})

    def start(self) -> None:
        """Let TaskIQ make stream and group."""
        super().start()

        async def nothing(_: AsyncBroker) -> None: ...

        self.with_broker(nothing)

    def truth(self) -> int:
        """Count the entries behind the last one that was delivered one by one."""
        (group,) = self.client.xinfo_groups("mail")
        return len(self.client.xrange("mail", min=f"({group['last-delivered-id'].decode()}"))

    def purge(self) -> None:
        """Trim the stream to nothing."""
        self.client.xtrim("mail", maxlen=0, approximate=False)


class TaskiqOnRabbitMQ(TaskiqList):
    """TaskIQ on RabbitMQ, on the quorum queue that it declares."""

    system = "rabbitmq"
    broker = RabbitMQ  # type: ignore[assignment]
    way = "amqp"
    sees = frozenset({DEPTH, CONSUMERS})

    def start(self) -> None:
        """Let TaskIQ declare the queue anew."""
        remove_queues(self.server.port, "mail", "taskiq.dead_letter")

        async def nothing(_: AsyncBroker) -> None: ...

        self.with_broker(nothing)

    def truth(self) -> int:
        """Ask over a connection of its own."""
        with amqp.Connection(f"127.0.0.1:{self.server.port}") as connection:
            return int(connection.channel().queue_declare("mail", passive=True).message_count)

    def purge(self) -> None:
        """Purge as an operator does."""
        with amqp.Connection(f"127.0.0.1:{self.server.port}") as connection:
            connection.channel().queue_purge("mail")
