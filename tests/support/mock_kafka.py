"""A broker that speaks Kafka's protocol on loopback: the mock cluster that librdkafka brings along.

Apache Kafka is in no package of PyPI or Debian. This broker keeps topics, groups and offsets, and rebalances. Its
port cannot be chosen, so "down" is a process that is stopped in its tracks, and goes on with all that it had.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

from demo_app.stack.process import Process

_BROKER = """
import signal
from confluent_kafka import Producer
cluster = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "none", "log_level": "0"})
(broker,) = cluster.list_topics(timeout=5).brokers.values()
print(f"address={broker.host}:{broker.port}", flush=True)
signal.pause()
"""


class MockKafka(Process):
    """One broker with topics of four partitions that are made when they are first written to."""

    def __init__(self, folder: Path) -> None:
        log = folder / "kafka.log"
        super().__init__("kafka", [sys.executable, "-c", _BROKER], log=log, ready=lambda: "address=" in self.tail(5))
        self._halted = False

    @property
    def address(self) -> str:
        """Host and port."""
        return self.tail(5).partition("address=")[2].split()[0]

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return super().running and not self._halted

    def start(self, timeout: float = 30.0) -> None:
        """Start, or go on after ``stop``."""
        if self._halted:
            self._halted = False
            os.kill(self.pid, signal.SIGCONT)
        else:
            super().start(timeout)

    def stop(self) -> None:
        """Stop in the tracks: connections stay open and nobody answers."""
        self._halted = True
        os.kill(self.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End it for good."""
        assert self.child is not None
        child: subprocess.Popen[bytes] = self.child
        child.kill()
        child.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
