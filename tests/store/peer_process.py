"""A process that writes with prometheus_client itself, in multiprocess mode, and then ends.

PROMETHEUS_MULTIPROC_DIR=... python peer_process.py NUMBER
"""

from __future__ import annotations

import sys

from prometheus_client import Counter, Gauge, Histogram, Summary

number = float(sys.argv[1])
counter = Counter("shop_orders", "Orders.", ["country"])
counter.labels("fr").inc(number)
counter.labels(f"only-{number:g}").inc()
Summary("shop_basket_items", "Items.").observe(number)
histogram = Histogram("shop_price", "Prices.", ["kind"], buckets=(1, 2.5, 1e6, 1e7))
histogram.labels("sale").observe(number)
histogram.labels("sale").observe(2e6)
for mode in ["all", "liveall", "min", "livemin", "max", "livemax", "sum", "livesum", "mostrecent", "livemostrecent"]:
    Gauge(f"shop_gauge_{mode}", f"A gauge of mode {mode}.", ["kind"], multiprocess_mode=mode).labels("x").set(number)  # type: ignore[arg-type]
Gauge("shop_never_set", "A gauge that nobody set.", multiprocess_mode="mostrecent")
