"""Pollers of queues, one module per kind of broker. Imported by the exporter, so nothing here needs FastAPI."""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlsplit

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.queue_adapters.arq import ArqPoller
from fastapi_headroom.probes.queue_adapters.base import Poller, Sample
from fastapi_headroom.probes.queue_adapters.celery import CeleryRedisPoller
from fastapi_headroom.probes.queue_adapters.celery_rabbitmq import CeleryRabbitMQPoller
from fastapi_headroom.probes.queue_adapters.dramatiq import DramatiqRedisPoller
from fastapi_headroom.probes.queue_adapters.dramatiq_rabbitmq import DramatiqRabbitMQPoller
from fastapi_headroom.probes.queue_adapters.kafka import KafkaPoller
from fastapi_headroom.probes.queue_adapters.redis_lists import RedisListPoller
from fastapi_headroom.probes.queue_adapters.redis_streams import RedisStreamPoller
from fastapi_headroom.probes.queue_adapters.rq import RQPoller
from fastapi_headroom.probes.queue_adapters.taskiq import TaskiqRedisPoller
from fastapi_headroom.probes.queue_adapters.taskiq_rabbitmq import TaskiqRabbitMQPoller

__all__ = ["Poller", "Sample", "poller_for"]


class _Kind(Protocol):
    def from_url(self, url: str) -> Poller: ...


_BY_SCHEME: dict[str, _Kind] = {
    "celery+redis": CeleryRedisPoller,
    "celery+rediss": CeleryRedisPoller,
    "celery+amqp": CeleryRabbitMQPoller,
    "celery+amqps": CeleryRabbitMQPoller,
    "rq+redis": RQPoller,
    "rq+rediss": RQPoller,
    "arq+redis": ArqPoller,
    "arq+rediss": ArqPoller,
    "dramatiq+redis": DramatiqRedisPoller,
    "dramatiq+rediss": DramatiqRedisPoller,
    "dramatiq+amqp": DramatiqRabbitMQPoller,
    "dramatiq+amqps": DramatiqRabbitMQPoller,
    "taskiq+redis": TaskiqRedisPoller,
    "taskiq+rediss": TaskiqRedisPoller,
    "taskiq+amqp": TaskiqRabbitMQPoller,
    "taskiq+amqps": TaskiqRabbitMQPoller,
    "stream+redis": RedisStreamPoller,
    "stream+rediss": RedisStreamPoller,
    "list+redis": RedisListPoller,
    "list+rediss": RedisListPoller,
    "kafka": KafkaPoller,
}


def poller_for(url: str) -> Poller:
    """Return the poller for a queue URL such as ``celery+redis://host:6379/0?queues=mail,reports``.

    Raises SettingsError for a URL that cannot be used and MissingExtraError when the broker's client
    library is not installed. Does not connect yet.
    """
    scheme = urlsplit(url).scheme
    if (poller := _BY_SCHEME.get(scheme)) is None:
        # The scheme alone is shown: the rest of the URL may hold a password.
        raise SettingsError(
            f"queue URL with scheme {scheme or '(none)'!r} cannot be polled; the schemes are {', '.join(_BY_SCHEME)}, "
            "as in celery+redis://host:6379/0?queues=mail,reports"
        )
    return poller.from_url(url)
