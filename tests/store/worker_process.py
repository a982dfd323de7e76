"""A worker process for the tests: opens a writer, then answers one Python expression per line.

python worker_process.py DIRECTORY [FILE_SIZE_LIMIT]
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "instrumentation"))

from fastapi_headroom import catalog
from fastapi_headroom.store.writer import Writer

ERRORS = catalog.PROBE_ERRORS


def fork_writing(amount: float) -> int:
    """Fork a child that writes through an inherited handle and then stays. Returns its process id."""
    handle = writer.counter(ERRORS, "request")
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        handle.inc(amount)
        writer.counter(ERRORS, "cache").inc(amount)
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    return child


def fork_serving(amount: float) -> tuple[int, str]:
    """Fork a child that opens a writer of its own, writes and stays. Returns its process id and slot."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        mine = Writer.open(directory)
        mine.counter(ERRORS, "request").inc(amount)
        os.write(done, mine.worker.encode())
        signal.pause()
    return child, os.read(ready, 16).decode()


def keep_writing() -> bool:
    """Write in the background without end: known series, and at first new ones."""

    def run() -> None:
        histogram = writer.histogram(catalog.POOL_WAIT, "primary")
        counter = writer.counter(ERRORS, "request")
        number = 0
        while True:
            number += 1
            counter.inc()
            histogram.observe(number % 7 / 10)
            if number % 50 == 0 and number <= 20_000:
                writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc(number)
                writer.histogram(catalog.LOOP_HOLD, f"/{number}").observe(0.2)

    threading.Thread(target=run, daemon=True).start()
    return True


directory = Path(sys.argv[1])
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
writer = Writer.open(directory)
print(writer.worker, flush=True)
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
