"""arq as the queue kit sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from arq import ArqRedis, create_pool
from arq.connections import RedisSettings

from fastapi_headroom import catalog
from tests.support.queue_kit import PYTHON
from tests.support.queue_redis import OnRedis

READY = """
local ready = 0
for _, job in ipairs(redis.call('ZRANGEBYSCORE', 'mail', '-inf', ARGV[1])) do
    if redis.call('EXISTS', 'arq:in-progress:' .. job) == 0 then ready = ready + 1 end
end
return ready
"""


class Arq(OnRedis):
    """arq with its own worker."""

    kind = "arq"
    measures = True
    sees = frozenset({catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE, catalog.QUEUE_IN_PROGRESS, catalog.QUEUE_DELAYED})

    def with_client(self, use: Callable[[ArqRedis], Awaitable[Any]]) -> Any:
        """Use a client of arq's."""

        async def run() -> Any:
            pool = await create_pool(RedisSettings.from_dsn(self.server.url), default_queue_name="mail")  # type: ignore[attr-defined]
            try:
                return await use(pool)
            finally:
                await pool.aclose()

        return asyncio.run(run())

    def publish(self, count: int = 1, kind: str = "count") -> None:
        """Enqueue."""

        async def enqueue(client: ArqRedis) -> None:
            for _ in range(count):
                assert await client.enqueue_job("kit", str(self.folder), kind)

        self.with_client(enqueue)

    def publish_later(self, seconds: float) -> None:
        """Defer."""
        due = datetime.now(UTC) + timedelta(seconds=seconds)
        self.with_client(lambda client: client.enqueue_job("kit", str(self.folder), _defer_until=due))

    def truth(self) -> int:
        """Ask for each job that is due whether it runs, in one go."""
        seconds, microseconds = self.client.time()
        return int(self.client.eval(READY, 0, seconds * 1000 + microseconds // 1000))

    def environment(self) -> dict[str, str]:
        """Point the worker at this broker."""
        return super().environment() | {"TEST_BROKER_URL": self.server.url}  # type: ignore[attr-defined]

    def worker_command(self) -> list[str]:
        """Run arq's worker."""
        return [PYTHON, "-m", "arq", "tests.support.arq_app.WorkerSettings"]
