"""The catalog against what the probes and the exporter say that they write."""

from __future__ import annotations

import re

from fastapi_headroom import catalog
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.caches.probe import LocalCachesProbe
from fastapi_headroom.probes.http_client import HttpClientProbe
from fastapi_headroom.probes.loop import LoopProbe
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.pools.probe import OtherPoolsProbe
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.request import RequestProbe
from fastapi_headroom.probes.runtime import RuntimeProbe

PROBES = (
    RequestProbe,
    HttpClientProbe,
    PoolProbe,
    OtherPoolsProbe,
    CacheProbe,
    LocalCachesProbe,
    LoopProbe,
    QueueProbe,
    RuntimeProbe,
)
OF_THE_EXPORTER = {catalog.WORKERS, catalog.REMAINING, catalog.QUEUE_DEPTH, catalog.QUEUE_OLDEST_AGE}
OF_THE_EXPORTER |= {catalog.QUEUE_DELAYED, catalog.QUEUE_FAILED, catalog.QUEUE_CONSUMERS}
OF_THE_EXPORTER |= {catalog.QUEUE_IN_PROGRESS, catalog.WORKER_RESTARTS}  # restarts: the store, when it claims a slot
OF_THE_EXPORTER |= {catalog.CACHE_MEMORY, catalog.CACHE_MEMORY_LIMIT, catalog.CACHE_EXPIRATIONS, catalog.CACHE_CLIENTS}
OF_THE_EXPORTER |= {catalog.CACHE_CLIENTS_LIMIT, catalog.CACHE_SERVER_LOOKUPS, catalog.CACHE_SERVER_INFO}
OF_THE_EXPORTER |= {catalog.CACHE_SAMPLED_KEYS, catalog.CACHE_SAMPLED_BYTES, catalog.CACHE_SAMPLED_IDLE}


def test_every_row_has_somebody_who_writes_it() -> None:
    """No metric is documented that nothing writes: each row is a probe's, the exporter's or the store's own."""
    claimed = {metric for probe in PROBES for metric in probe.metrics} | OF_THE_EXPORTER
    orphans = [metric.name for metric in catalog.ALL if metric.stem != "self" and metric not in claimed]
    assert not orphans


def test_names_follow_the_contract() -> None:
    """Names are unique, counters end in _total and only they do, histograms have rising bounds, gauges have a mode."""
    assert len(catalog.BY_NAME) == len(catalog.ALL)
    for metric in catalog.ALL:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        assert metric.help.endswith("."), metric.name
