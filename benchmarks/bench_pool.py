"""What the pool probe adds to a checkout and to a query, in microseconds of CPU, beside what each costs alone.

SQLite in memory, so that nothing but Python runs, within a request that holds the event loop. The column "peer" is
the call without the probe.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

from benchmarks.measuring import Row, Work, added, main
from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

BUDGETS = {"checkout and checkin": 5.0, "query": 3.0}
"""Microseconds."""


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield both."""
    engine = create_engine("sqlite://", poolclass=QueuePool)
    connection = engine.connect()
    statement = text("select 1")
    request = Ledger("GET")
    request.route = "/orders/{order_id}"
    request.stepping = True  # as while a step of a request runs
    ledger.current.set(request)
    work: dict[str, Work] = {
        "checkout and checkin": lambda: engine.raw_connection().close(),
        "query": lambda: connection.execute(statement).close(),
    }
    writer, probe = Writer.in_memory(), PoolProbe(load({}))
    for what, call in work.items():
        alone, more = added(call, lambda: probe.bind(writer), probe.close, 7 if quick else 81)
        yield Row(f"{what}: added, and the call alone", "us", more, alone, budget=BUDGETS[what])


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
