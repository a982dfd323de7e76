"""An app with metrics of its own, made with prometheus_client: every type, every mode of gauges, a custom collector."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    Summary,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

import fastapi_headroom as headroom

MODES = ("all", "liveall", "sum", "livesum", "max", "livemax", "min", "livemin", "mostrecent", "livemostrecent")

app = FastAPI()
orders = Counter("shop_orders", "Orders.", ["kind"])
basket = Histogram("shop_basket_euros", "Baskets.", buckets=(10.0, 100.0))
checkout = Summary("shop_checkout_seconds", "Checkouts.")
levels = {mode: Gauge(f"shop_{mode}", f"A gauge of mode {mode}.", multiprocess_mode=mode) for mode in MODES}
Info("shop_build", "Build.").info({"commit": "abc"})
Enum("shop_state", "State.", states=["open", "closed"]).state("open")


class Stock:
    """A collector of the app's own. ``broken`` makes it raise."""

    broken = False

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        if self.broken:
            raise RuntimeError("the warehouse does not answer")
        family = GaugeMetricFamily("shop_stock", "Stock.", labels=["item"])
        family.add_metric(["tea"], 7)
        yield family


stock = Stock()
REGISTRY.register(stock)


@app.get("/order/{amount}")
async def order(amount: float) -> int:
    """Write every metric but the gauges; return which worker did."""
    orders.labels(kind="retail").inc()
    basket.observe(amount)
    checkout.observe(0.5)
    return os.getpid()


@app.get("/level/{pid}/{value}")
async def level(pid: int, value: float) -> bool:
    """Set the gauges of one worker."""
    if pid != os.getpid():
        return False
    for gauge in levels.values():
        gauge.set(value)
    return True


@app.get("/break")
async def break_collector() -> int:
    """Make the collector raise from now on."""
    stock.broken = True
    return os.getpid()


@app.get("/own-metrics", response_class=PlainTextResponse)
async def own_metrics() -> bytes:
    """Serve PROMETHEUS_MULTIPROC_DIR as prometheus_client's documentation shows it."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


headroom.init(app)
