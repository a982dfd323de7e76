"""What the exporter adds to a snapshot."""

from __future__ import annotations

from pathlib import Path

from fastapi_headroom import catalog, thresholds
from fastapi_headroom.advice.remaining import READS
from fastapi_headroom.catalog import Metric
from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.scrape import Scraper
from fastapi_headroom.store.reader import Family, Reader
from fastapi_headroom.store.writer import Writer
from tests.exporter.support import Broker, eventually, polled


def values(families: list[Family]) -> dict[str, float]:
    """Return every sample by name and label values."""
    return {
        name + "".join(f" {value}" for _, value in labels): value
        for family in families
        for name, labels, value in family.samples
    }


def test_workers_are_counted_by_the_locks_that_they_hold(tmp_path: Path) -> None:
    """Alive are those who hold a slot now; expected is told only where it is known."""
    first, second = Writer.open(tmp_path), Writer.open(tmp_path)
    collector = Collector(Reader(tmp_path), expected_workers=3)
    seen = values(collector.collect())
    assert (seen["headroom_workers alive"], seen["headroom_workers expected"]) == (2.0, 3.0)
    second.close()
    assert values(collector.collect())["headroom_workers alive"] == 1.0
    first.close()
    assert "headroom_workers expected" not in values(Collector(Reader(tmp_path)).collect())


def test_a_file_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    """A foreign file is counted as unreadable and costs the scrape nothing else."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.REQUESTS, "/a", "ok").inc()
    (tmp_path / "counter_slot7.db").write_bytes(b"\xff" * 64)
    seen = values(Collector(Reader(tmp_path)).collect())
    assert seen["headroom_slots_unreadable"] == 1.0
    assert seen["headroom_requests_total /a ok"] == 1.0


def test_the_scrape_tells_its_own_cost(tmp_path: Path) -> None:
    """The series are those of this scrape, the duration is that of the one before: none on the first."""
    Writer.open(tmp_path)
    scraper = Scraper(Collector(Reader(tmp_path)))
    first, second = scraper.scrape().decode(), scraper.scrape().decode()
    assert "headroom_scrape_duration_seconds" not in first
    lines = [line for line in second.splitlines() if not line.startswith("#")]
    assert f"headroom_series {float(len(lines))}" in lines
    (duration,) = (float(line.split()[1]) for line in lines if line.startswith("headroom_scrape_duration_seconds"))
    assert 0 < duration < 5


def test_what_is_left_is_computed_from_all_workers_and_from_queues(tmp_path: Path) -> None:
    """headroom_remaining_ratio reads the merged samples of workers and what was polled."""
    for held in (0.2, 0.6):
        writer = Writer.open(tmp_path)
        writer.gauge(catalog.LOOP_UTILIZATION, writer.worker).set(held)
        writer.gauge(catalog.POOL_COUNT, "primary", "used").set(2)
        writer.gauge(catalog.POOL_MAX, "primary").set(8)
    broker = Broker((catalog.QUEUE_OLDEST_AGE, ("redis", "mail", "0"), thresholds.QUEUE_AGE_SECONDS / 4))
    queue = polled(broker)
    seen = values(Collector(Reader(tmp_path), queues=[queue]).collect())
    queue.stop()
    assert seen["headroom_remaining_ratio worst_worker loop"] == 0.4
    assert seen["headroom_remaining_ratio primary pool"] == 0.75
    assert seen["headroom_remaining_ratio mail queue"] == 0.75


def test_a_broker_that_is_down_is_a_gap_and_comes_back(tmp_path: Path) -> None:
    """While a broker fails its queues have no samples and the queue probe is down, beside the workers' probes."""
    writer = Writer.open(tmp_path)
    for probe in ("queue", "pool"):
        writer.gauge(catalog.PROBE_UP, probe).set(1)
    depth = "headroom_queue_depth mail redis 0"  # values in the order of the labels' names
    broker = Broker((catalog.QUEUE_DEPTH, ("redis", "mail", "0"), 5.0))
    queue = polled(broker)
    collector = Collector(Reader(tmp_path), queues=[queue])
    seen = values(collector.collect())
    assert (seen[depth], seen["headroom_probe_up queue"], seen["headroom_probe_up pool"]) == (5.0, 1.0, 1.0)
    broker.error = ConnectionError("refused")
    eventually(lambda: queue.up is False, "the failure")
    seen = values(collector.collect())
    assert depth not in seen
    assert (seen["headroom_probe_up queue"], seen["headroom_probe_up pool"]) == (0.0, 1.0)
    broker.error = None
    eventually(lambda: queue.up is True, "the recovery")
    assert values(collector.collect())[depth] == 5.0
    queue.stop()


def test_a_failed_worker_probe_is_not_hidden_by_a_good_broker(tmp_path: Path) -> None:
    """The queue probe is up only when it is up in the workers and the brokers answer."""
    Writer.open(tmp_path).gauge(catalog.PROBE_UP, "queue").set(0)
    queue = polled(Broker())
    assert values(Collector(Reader(tmp_path), queues=[queue]).collect())["headroom_probe_up queue"] == 0.0
    queue.stop()


def test_a_directory_that_is_not_there_is_an_empty_store(tmp_path: Path) -> None:
    """The exporter's own rows are there before the first worker is."""
    seen = values(Collector(Reader(tmp_path / "later")).collect())
    assert seen == {"headroom_workers alive": 0.0, "headroom_slots_unreadable": 0.0, "headroom_series": 3.0}


def test_consumers_that_workers_tell_stand_beside_those_that_are_polled(tmp_path: Path) -> None:
    """A broker's word on one queue hides nothing that workers say of another; of the same queue the broker's counts."""
    writer = Writer.open(tmp_path)
    writer.gauge(catalog.QUEUE_CONSUMERS, "redis", "mail", "_all").set(1.0)
    writer.gauge(catalog.QUEUE_CONSUMERS, "rabbitmq", "reports", "_all").set(1.0)
    broker = Broker((catalog.QUEUE_CONSUMERS, ("rabbitmq", "reports", "_all"), 4.0))
    queue = polled(broker)
    seen = values(Collector(Reader(tmp_path), queues=[queue]).collect())
    queue.stop()
    consumers = {name: value for name, value in seen.items() if name.startswith(catalog.QUEUE_CONSUMERS.name)}
    # label values in the order of the labels' names
    assert consumers == {
        "headroom_queue_consumers mail redis _all": 1.0,
        "headroom_queue_consumers reports rabbitmq _all": 4.0,
    }


def test_series_of_another_release_cost_no_scrape(tmp_path: Path) -> None:
    """Rows of ours with other labels, as another release or a metric of the app's own may have, are exported as they
    are, and what is computed from ours is computed from the rest."""
    writer = Writer.open(tmp_path)
    writer.gauge(catalog.QUEUE_OLDEST_AGE, "celery", "mail", "").set(30)
    for metric in READS:
        strange = Metric(metric.name, "gauge", "user", ("stranger",), "Text.", "", (), metric.mode)
        writer.gauge(strange, "x").set(1)
        if "db_client_connection_state" in metric.labels:
            partial = Metric(
                metric.name, "gauge", "user", ("db_client_connection_state",), "Text.", "", (), metric.mode
            )
            writer.gauge(partial, "used").set(1)
    seen = values(Collector(Reader(tmp_path)).collect())
    assert seen["headroom_remaining_ratio mail queue"] == 1 - 30 / thresholds.QUEUE_AGE_SECONDS
    assert all(seen[f"{metric.name} x"] == 1.0 for metric in READS)
    writer.close()
