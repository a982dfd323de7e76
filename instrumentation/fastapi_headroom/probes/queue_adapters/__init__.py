"""Pollers of queues, one module per kind of broker. Imported by the exporter, so nothing here needs FastAPI."""

from __future__ import annotations

from importlib import import_module
from typing import Final, Protocol, cast

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.queue_adapters.base import Poller, Sample
from fastapi_headroom.urls import scheme_of

__all__ = ["Poller", "Sample", "poller_for"]


class _Kind(Protocol):
    def from_url(self, url: str) -> Poller: ...


_BY_SCHEME: Final = {
    "celery+redis": "celery:CeleryRedisPoller",
    "celery+rediss": "celery:CeleryRedisPoller",
    "celery+amqp": "celery_rabbitmq:CeleryRabbitMQPoller",
    "celery+amqps": "celery_rabbitmq:CeleryRabbitMQPoller",
    "rq+redis": "rq:RQPoller",
    "rq+rediss": "rq:RQPoller",
    "arq+redis": "arq:ArqPoller",
    "arq+rediss": "arq:ArqPoller",
    "dramatiq+redis": "dramatiq:DramatiqRedisPoller",
    "dramatiq+rediss": "dramatiq:DramatiqRedisPoller",
    "dramatiq+amqp": "dramatiq_rabbitmq:DramatiqRabbitMQPoller",
    "dramatiq+amqps": "dramatiq_rabbitmq:DramatiqRabbitMQPoller",
    "taskiq+redis": "taskiq:TaskiqRedisPoller",
    "taskiq+rediss": "taskiq:TaskiqRedisPoller",
    "taskiq+amqp": "taskiq_rabbitmq:TaskiqRabbitMQPoller",
    "taskiq+amqps": "taskiq_rabbitmq:TaskiqRabbitMQPoller",
    "stream+redis": "redis_streams:RedisStreamPoller",
    "stream+rediss": "redis_streams:RedisStreamPoller",
    "list+redis": "redis_lists:RedisListPoller",
    "list+rediss": "redis_lists:RedisListPoller",
    "kafka": "kafka:KafkaPoller",
}
"""Module and class. A module is imported when a queue of its kind is polled."""


def poller_for(url: str) -> Poller:
    """Return the poller for a queue URL such as ``celery+redis://host:6379/0?queues=mail,reports``.

    Raises SettingsError for a URL that cannot be used and MissingExtraError when the broker's client
    library is not installed. Does not connect yet.
    """
    scheme = scheme_of(url)
    if (found := _BY_SCHEME.get(scheme)) is None:
        # The scheme alone is shown: the rest of the URL may hold a password.
        raise SettingsError(
            f"queue URL with scheme {scheme or '(none)'!r} cannot be polled; the schemes are {', '.join(_BY_SCHEME)}, "
            "as in celery+redis://host:6379/0?queues=mail,reports"
        )
    module, _, name = found.partition(":")
    return cast(_Kind, getattr(import_module(f"{__name__}.{module}"), name)).from_url(url)
