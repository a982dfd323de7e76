"""What the pool probe adds to a checkout and to a query, in microseconds of CPU.

    python benchmarks/bench_pool.py [--quick]

SQLite in memory, so that nothing but Python runs. Each round measures without, with, and again without the probe;
the figure is the median of the rounds, beside what the same call costs alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "instrumentation"))

from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

BUDGETS = {"checkout and checkin": 5.0, "query": 3.0}
"""Microseconds."""


def main(arguments: list[str] | None = None) -> int:
    """Measure both and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 7 if parser.parse_args(arguments).quick else 41
    engine = create_engine("sqlite://", poolclass=QueuePool)
    connection = engine.connect()
    statement = text("select 1")
    request = Ledger("GET")
    request.route = "/orders/{order_id}"
    request.stepping = True  # as while a step of a request runs
    ledger.current.set(request)
    work: dict[str, Callable[[], object]] = {
        "checkout and checkin": lambda: engine.raw_connection().close(),
        "query": lambda: connection.execute(statement).close(),
    }
    print(f"{'what':<24}{'alone':>10}{'added':>10}{'budget':>10}")
    for what, call in work.items():
        alone, added = compare(call, rounds)
        print(f"{what:<24}{alone:>7.2f} us{added:>7.2f} us{BUDGETS[what]:>7.2f} us")
    return 0


def compare(call: Callable[[], object], rounds: int, count: int = 2_000) -> tuple[float, float]:
    """Return what a call costs alone and what the probe adds, in microseconds."""
    writer, probe = Writer.in_memory(), PoolProbe(load({}))
    alone, added = [], []
    for _ in range(rounds):
        before = cpu(call, count)
        probe.bind(writer)
        measured = cpu(call, count)
        probe.close()
        base = (before + cpu(call, count)) / 2
        alone.append(base)
        added.append(measured - base)
    return statistics.median(alone), statistics.median(added)


def cpu(call: Callable[[], object], count: int) -> float:
    """Return the CPU time of one call in microseconds."""
    call()
    started = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - started) / count * 1e6


if __name__ == "__main__":
    raise SystemExit(main())
