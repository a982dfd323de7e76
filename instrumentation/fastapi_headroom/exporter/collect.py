"""Collect one scrape: the store's snapshot, and the rows that only the exporter can tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from fastapi_headroom import catalog
from fastapi_headroom.advice.remaining import READS, Labels, remaining
from fastapi_headroom.catalog import Metric
from fastapi_headroom.exporter import pollers
from fastapi_headroom.exporter.pollers import PolledCache, PolledQueue
from fastapi_headroom.exporter.pool_advisor import PoolAdvisor
from fastapi_headroom.probes.queue_adapters import Sample
from fastapi_headroom.store.reader import Family, Reader, Snapshot

_SHARED = {catalog.CACHE_ENTRIES, catalog.CACHE_EVICTIONS}
"""What pollers tell of servers and workers of caches in their process."""


class Collector:
    """Reads the store and adds the exporter's rows. Not for concurrent use."""

    def __init__(
        self,
        reader: Reader,
        *,
        expected_workers: int | None = None,
        queues: Sequence[PolledQueue] = (),
        caches: Sequence[PolledCache] = (),
        pools: PoolAdvisor | None = None,
    ) -> None:
        self._reader, self._expected, self._pools = reader, expected_workers, pools
        self._polled: tuple[PolledQueue, ...] = (*queues, *caches)
        self.scrape_seconds: float | None = None
        """How long the scrape before took, read and rendered; set by whoever renders."""

    def collect(self) -> list[Family]:
        """Return all families of one scrape, each once."""
        snapshot = self._reader.read()
        families = {family.name: family for family in snapshot.families}
        for metric, samples in self._own(snapshot, families).items():
            families[metric.family] = Family(
                name=metric.family, kind=metric.kind, help=metric.help, samples=[(metric.name, *row) for row in samples]
            )
        # its own sample counts too
        series = 1.0 + sum(len(family) for name, family in families.items() if name != catalog.SERIES.family)
        families[catalog.SERIES.family] = Family(
            name=catalog.SERIES.family,
            kind="gauge",
            help=catalog.SERIES.help,
            samples=[(catalog.SERIES.name, (), series)],
        )
        return list(families.values())

    def _own(self, snapshot: Snapshot, families: dict[str, Family]) -> dict[Metric, list[tuple[Labels, float]]]:
        rows: list[Sample] = [
            (catalog.WORKERS, ("alive",), float(len(snapshot.alive))),
            (catalog.SLOTS_UNREADABLE, (), float(len(snapshot.unreadable))),
        ]
        if self._expected is not None:
            rows.append((catalog.WORKERS, ("expected",), float(self._expected)))
        if self.scrape_seconds is not None:
            rows.append((catalog.SCRAPE_DURATION, (), self.scrape_seconds))
        for server in self._polled:
            rows += server.rows()
        if self._pools is not None:
            self._pools.alive = snapshot.alive
            rows += self._pools.rows()
        own = _by_metric(rows)
        if catalog.QUEUE_CONSUMERS in own and (family := families.get(catalog.QUEUE_CONSUMERS.family)) is not None:
            # Workers tell it where the broker cannot, so there are rows of both kinds.
            told = {labels: value for _, labels, value in family.samples} | dict(own[catalog.QUEUE_CONSUMERS])
            own[catalog.QUEUE_CONSUMERS] = list(told.items())
        merged = {
            metric.name: [(labels, value) for (_, labels), value in zip(family.rows.series, family.values, strict=True)]
            for metric in READS
            if (family := families.get(metric.family)) is not None
        }
        merged |= {metric.name: samples for metric, samples in own.items()}
        left: list[Sample] = [(catalog.REMAINING, (row.resource, row.name), row.ratio) for row in remaining(merged)]
        own |= _by_metric(left)
        if states := pollers.up(self._polled):
            own[catalog.PROBE_UP] = _probe_up(families, states)
        for metric in own.keys() & _SHARED:
            own[metric] = _beside(families, metric, own[metric])
        return own


def _by_metric(rows: Sequence[Sample]) -> dict[Metric, list[tuple[Labels, float]]]:
    """Group rows by metric; a label set that two pollers report counts once, with its larger value."""
    grouped: defaultdict[Metric, dict[Labels, float]] = defaultdict(dict)
    for metric, values, value in rows:
        labels = tuple(sorted(zip(metric.labels, values, strict=True)))
        grouped[metric][labels] = max(value, grouped[metric].get(labels, value))
    return {metric: list(samples.items()) for metric, samples in grouped.items()}


def _probe_up(families: dict[str, Family], polled: dict[str, bool]) -> list[tuple[Labels, float]]:
    """Return the probes' states with the pollers' word on theirs: up is who is up everywhere."""
    family = families.get(catalog.PROBE_UP.family)
    states = {labels: value for _, labels, value in family.samples} if family else {}
    for probe, is_up in polled.items():
        labels = (("probe", probe),)
        states[labels] = min(float(is_up), states.get(labels, 1.0))
    return list(states.items())


def _beside(
    families: dict[str, Family], metric: Metric, rows: list[tuple[Labels, float]]
) -> list[tuple[Labels, float]]:
    """Return what was polled beside what workers wrote of the same metric; of one label set, what was polled."""
    family = families.get(metric.family)
    samples = {labels: value for _, labels, value in family.samples} if family else {}
    return list((samples | dict(rows)).items())
