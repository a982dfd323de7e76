"""The job that the queue kit gives to every library, and workers for what has no library: lists and streams."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import redis

GROUP = "billing"


def run(folder: str, kind: str = "count") -> None:
    """Do one job: ``count`` marks that it ran, ``hold`` waits for the gate first, ``again`` fails twice before.

    Raises ConnectionError for an attempt that is to be repeated, ValueError for ``fail``.
    """
    here = Path(folder)
    if kind == "hold":
        mark(here / "holding")
        deadline = time.monotonic() + 60
        while not (here / "gate").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    if kind == "again" and marks(here / "attempts") < 2:
        mark(here / "attempts")
        raise ConnectionError("busy")
    if kind == "fail":
        raise ValueError("no such address")
    if kind == "die":
        os.abort()
    mark(here / "done")


def mark(file: Path) -> None:
    """Add one mark; safe among processes."""
    with file.open("ab") as stream:
        stream.write(b".")


def marks(file: Path) -> int:
    """Return how many marks there are."""
    return file.stat().st_size if file.exists() else 0


def work_list(client: Any, name: str) -> None:
    """Take jobs from a list for good."""
    while True:
        if (popped := client.brpop([name], timeout=1)) is not None:
            job = json.loads(popped[1])
            try:
                run(job["folder"], job["kind"])
            except ConnectionError:
                client.lpush(name, json.dumps(job | {"enqueued_at": time.time()}))


def work_stream(client: Any, name: str) -> None:
    """Take jobs from a stream's group for good; what was delivered to a consumer that is gone comes first."""
    consumer = f"worker-{os.getpid()}"
    _, abandoned, *_ = client.xautoclaim(name, GROUP, consumer, min_idle_time=0)
    while True:
        entries = abandoned or [
            row for _, rows in client.xreadgroup(GROUP, consumer, {name: ">"}, 1, 500) for row in rows
        ]
        abandoned = []
        for identity, job in entries:
            try:
                run(job["folder"], job["kind"])
            except ConnectionError:
                client.xadd(name, job)
            client.xack(name, GROUP, identity)


def work_kafka(address: str, topic: str, group: str) -> None:
    """Take jobs from a topic for good, as a member of the group; an offset is committed when its job is done."""
    from confluent_kafka import Consumer, Producer

    options = {"bootstrap.servers": address, "log_level": "0"}
    producer = Producer(options)
    consumer = Consumer(
        {
            **options, "group.id": group, "enable.auto.commit": "false", "auto.offset.reset": "earliest",
            "session.timeout.ms": "6000", "heartbeat.interval.ms": "300",
        }
    )  # fmt: skip
    consumer.subscribe([topic])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while True:
            message = consumer.poll(0.2)
            if message is None or message.error() is not None:
                continue
            job = json.loads(message.value())
            try:
                run(job["folder"], job["kind"])
            except ConnectionError:
                producer.produce(topic, message.value())
                producer.flush(10)
            consumer.commit(message, asynchronous=False)
    finally:
        consumer.close()  # leaves the group


if __name__ == "__main__" and sys.argv[1] == "kafka":
    work_kafka(*sys.argv[2:])
elif __name__ == "__main__":
    work = {"list": work_list, "stream": work_stream}[sys.argv[1]]
    work(redis.Redis.from_url(sys.argv[2], decode_responses=True), sys.argv[3])
