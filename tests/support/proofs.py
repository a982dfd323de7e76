"""Proofs about the store that take a number: small ones in the normal suite, large ones in ``tests/soak``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastapi_headroom import catalog
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.support.serving import ROOT

COUNTED = ("headroom_requests_total", (("http_route", "/counted"), ("outcome", "ok")))
LATENCY = catalog.REQUEST_LATENCY.name
ROUTE = (("http_route", "/counted"),)


@contextlib.contextmanager
def counting(directory: Path, processes: int, threads: int, increments: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Run processes that all begin to count at once."""
    script = Path(__file__).with_name("counting_process.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "instrumentation")])}
    command = [sys.executable, str(script), str(directory), str(threads), str(increments)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def prove_exact_counts(directory: Path, *, processes: int, threads: int, increments: int) -> int:
    """Count from many threads of several processes while this one reads all the time; return the number of reads.

    Every read must show totals that do not fall, whole numbers (a torn double is none), buckets that do not
    fall from bound to bound, and a sum that belongs to its count. At the end all is exact.
    """
    writing = processes * threads
    reader, reads, total_before = Reader(directory), 0, 0.0
    with counting(directory, processes, threads, increments) as running:
        while any(process.poll() is None for process in running):
            values = reader.read().values()
            total = values.get(COUNTED, 0.0)
            assert total_before <= total <= writing * increments and total.is_integer()
            total_before = total
            count, doubled = (
                values.get((f"{LATENCY}_count", ROUTE), 0.0),
                2 * values.get((f"{LATENCY}_sum", ROUTE), 0.0),
            )
            assert count.is_integer() and doubled.is_integer()
            assert abs(doubled - count) < increments  # what is written while the file is read
            buckets = [value for (name, labels), value in values.items() if name == f"{LATENCY}_bucket"]
            assert all(lower <= upper for lower, upper in pairwise(buckets))
            assert not buckets or buckets[-1] == count
            reads += 1
            time.sleep(0.002)
        assert [process.returncode for process in running] == [0] * processes
    values = reader.read().values()
    assert values[COUNTED] == values[f"{LATENCY}_count", ROUTE] == writing * increments
    assert values[f"{LATENCY}_sum", ROUTE] == writing * increments / 2
    return reads


def prove_restarts_leave_nothing(directory: Path, *, restarts: int, workers: int) -> int:
    """Restart workers again and again, some in order and some as if killed, while two readers scrape; return the reads.

    At the end the directory has the files of as many workers as ran at once, and every count.
    """
    stop = threading.Event()
    reads, fell, most = [0], [0], [0]

    def scrape() -> None:
        reader, before = Reader(directory), 0.0
        while not stop.is_set():
            snapshot = reader.read()
            value = snapshot.values().get(COUNTED, 0.0)
            fell[0] += value < before or bool(snapshot.unreadable)
            before, most[0] = value, max(most[0], len(snapshot.alive))
            reads[0] += 1
            time.sleep(0.001)
        reader.close()

    scrapers = [threading.Thread(target=scrape) for _ in range(2)]
    running = [Writer.open(directory) for _ in range(workers)]
    chance = random.Random(11)
    try:
        for scraper in scrapers:
            scraper.start()
        for number in range(restarts):
            place = chance.randrange(workers)
            leaving = running[place]
            if number % 2:
                leaving.close()
            else:  # what is left of a killed worker: its files as they were, and a lock that nobody holds
                slot = leaving._files.slot
                assert slot is not None
                slot.release()
                leaving._files.leave(copy=False)
            running[place] = Writer.open(directory)
            running[place].counter(*_COUNTER).inc()
            running[place].gauge(catalog.LOOP_TASKS, running[place].worker).set(1)
    finally:
        stop.set()
        for scraper in scrapers:
            scraper.join()
    values = Reader(directory).read().values()
    assert values[COUNTED] == restarts
    assert fell[0] == 0
    assert most[0] <= workers
    assert sum(value for (name, _), value in values.items() if name == "headroom_event_loop_tasks") == workers
    kinds = ("counter_slot{}.db", "gauge_livesum_slot{}.db", "slot{}.lock")
    expected = {kind.format(number) for kind in kinds for number in range(workers)}
    assert {path.name for path in directory.iterdir()} == expected
    for writer in running:
        writer.close()
    return reads[0]


_COUNTER = (catalog.REQUESTS, "/counted", "ok")


# ---------------------------------------------------------------------- hostile clients
class Hostile:
    """Makes requests of which nothing repeats: methods, paths, hosts, queries, headers and their values."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def word(self, length: int = 12) -> str:
        """Return letters that have not been there before."""
        return "".join(self._random.choices(string.ascii_letters + string.digits + "-._~%äé\udcff", k=length))

    def scope(self) -> dict[str, Any]:
        """Return the scope of a request."""
        chance = self._random
        paths = (
            f"/{self.word()}", f"/{self.word()}/{self.word()}", "/" + "/" * chance.randrange(9) + self.word(3),
            f"/items/{self.word()}", f"/items/{chance.getrandbits(60)}", f"/files/{self.word()}/{self.word()}",
            f"/slash/{self.word()}/",
        )  # fmt: skip
        path = chance.choice(paths)
        known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
        names = [
            b"host", b"user-agent", b"origin", b"accept", b"content-type", b"content-length", b"x-request-start",
            b"traceparent", b"baggage", b"x-forwarded-for", b"access-control-request-method", b"cookie",
        ]  # fmt: skip
        headers = [(name, self.word(20).encode("utf-8", "surrogateescape")) for name in chance.sample(names, 5)]
        headers.append((self.word(8).lower().encode("utf-8", "surrogateescape"), b"x"))
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": chance.choice(["1.1", "2", self.word(3)]),
            "method": chance.choice(known) if chance.random() < 0.7 else self.word(6).upper(), "scheme": "http",
            "path": path, "raw_path": path.encode("utf-8", "surrogateescape"), "root_path": "",
            "query_string": self.word(30).encode("utf-8", "surrogateescape"), "headers": headers,
            "client": (f"10.{chance.randrange(256)}.{chance.randrange(256)}.1", chance.randrange(65536)),
            "server": (self.word(), 80),
        }  # fmt: skip


async def flood(app: Any, requests: int, seed: int) -> None:
    """Send hostile requests, one after the other, in process."""
    hostile = Hostile(seed)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    for number in range(requests):
        try:
            await app(hostile.scope(), receive, send)
        except Exception as error:  # what a server would turn into a 500
            assert not isinstance(error, AssertionError), error
        if number % 1_000 == 0:
            await asyncio.sleep(0)


def label_sets(writer: Writer) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Return the label sets of every family: a histogram's buckets, sum and count are one."""
    return {
        (name, labels)
        for name, labels in writer.samples()
        if not name.endswith(("_bucket", "_sum")) and not any(label == "le" for label, _ in labels)
    }


def prove_hostile_clients_make_no_series(app: Any, writer: Writer, *, requests: int) -> tuple[int, int]:
    """Flood an app; return the label sets after the first 2,000 hostile requests, and how many came after those."""
    asyncio.run(flood(app, 2_000, seed=1))
    before = label_sets(writer)
    asyncio.run(flood(app, requests, seed=2))
    return len(before), len(label_sets(writer) - before)
