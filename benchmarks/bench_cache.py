"""What the cache probe adds to a cached read, in microseconds of CPU.

    python benchmarks/bench_cache.py [--quick]

A client whose replies come from a function, so that nothing but Python runs: the figure is what the probe adds to any
GET, MGET of ten keys, or pattern of a key that was not seen before.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "instrumentation"))

import redis

from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.key_pattern import fold
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

KEYS = [f"product:{number}" for number in range(10)]


class Instant(redis.Redis):
    """A client that is answered at once."""

    def _execute_command(self, *args: Any, **options: Any) -> Any:
        return b"x" if args[0] == "GET" else [b"x"] * 10


def main(arguments: list[str] | None = None) -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 7 if parser.parse_args(arguments).quick else 41
    client, numbers = Instant(), itertools.count()
    request = Ledger("GET")
    request.stepping = True  # as while a step of a request runs
    ledger.current.set(request)
    work: dict[str, Callable[[], object]] = {
        "GET, one key": lambda: client.get("product:5"),
        "GET, ever new keys": lambda: client.get(f"org:{next(numbers)}:plan"),
        "MGET, ten keys": lambda: client.mget(KEYS),
    }
    print(f"{'what':<24}{'alone':>10}{'added':>10}")
    for what, call in work.items():
        alone, added = compare(call, rounds)
        print(f"{what:<24}{alone:>7.2f} us{added:>7.2f} us")
    print(f"{'folding repr of args':<24}{cpu(lambda: fold('get_product:():{1: 5}'), 20_000):>7.2f} us")
    return 0


def compare(call: Callable[[], object], rounds: int, count: int = 2_000) -> tuple[float, float]:
    """Return what a call costs alone and what the probe adds, in microseconds."""
    writer, probe = Writer.in_memory(), CacheProbe(load({}))
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
