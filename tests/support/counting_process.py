"""A worker that counts from several threads as fast as it can.

python counting_process.py DIRECTORY THREADS INCREMENTS
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from fastapi_headroom import catalog
from fastapi_headroom.store.writer import Writer

directory, threads, increments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
writer = Writer.open(directory)
counter = writer.counter(catalog.REQUESTS, "/counted", "ok")
histogram = writer.histogram(catalog.REQUEST_LATENCY, "/counted")
sys.setswitchinterval(1e-4)


def count() -> None:
    inc, observe = counter.inc, histogram.observe
    for _ in range(increments):
        inc()
        observe(0.5)


running = [threading.Thread(target=count) for _ in range(threads)]
print("ready", flush=True)
sys.stdin.readline()
for thread in running:
    thread.start()
for thread in running:
    thread.join()
