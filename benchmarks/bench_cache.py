"""What the cache probe adds to a cached read, in microseconds of CPU, beside what the read costs alone.

A redis-py client whose replies come from a function, so that nothing but Python runs: the figure is what the probe
adds to any GET, to one of an entry whose age it knows, to one that misses, to an MGET of ten keys, to a key that was
not seen before, whose pattern must be found, and to a SET. The column "peer" is the call without the probe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import redis

from benchmarks.measuring import Row, Work, added, cpu, main
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.key_pattern import fold
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

KEYS = [f"product:{number}" for number in range(10)]
BUDGETS = {"GET, one key": 3.0, "GET, one key, age known": 3.0}
"""Microseconds."""


class Instant(redis.Redis):
    """A client that is answered at once."""

    def _execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] == "MGET":
            return [b"x"] * 10
        return None if args[1] == "none:5" else b"x"


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield every kind of read."""
    client, numbers = Instant(), itertools.count()
    request = Ledger("GET")
    request.stepping = True  # as while a step of a request runs
    ledger.current.set(request)
    work: dict[str, Work] = {
        "GET, one key": lambda: client.get("product:5"),
        "GET, one key, age known": lambda: client.get("plan:5"),
        "GET, one key, a miss": lambda: client.get("none:5"),
        "SET, one key, with a time to live": lambda: client.set("plan:6", b"x", ex=60),
        "GET, ever new keys": lambda: client.get(f"org:{next(numbers)}:plan"),
        "MGET, ten keys": lambda: client.mget(KEYS),
    }
    writer, probe = Writer.in_memory(), CacheProbe(load({}))

    def attach() -> None:
        probe.bind(writer)
        client.set("plan:5", b"x", ex=3600)

    for what, call in work.items():
        alone, more = added(call, attach, probe.close, 7 if quick else 81)
        yield Row(f"{what}: added, and the call alone", "us", more, alone, budget=BUDGETS.get(what))
    folding = cpu(lambda: fold("get_product:():{1: 5}"), 20_000) * 1e6
    yield Row("folding the repr of a function's arguments", "us", folding)


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
