"""Real Redis servers that stand together: a cluster of three masters, and a master that a sentinel watches."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from demo_app.stack.process import free_port
from demo_app.stack.servers import Redis, Server, find


class Cluster:
    """Three masters on loopback ports that share the slots."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.nodes: list[Redis] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for number in range(3):
                options = {
                    "cluster-enabled": "yes", "cluster-config-file": "nodes.conf", "cluster-port": str(free_port()),
                }  # fmt: skip
                node = Redis(self._folder / f"node{number}" / "redis", **options)
                self.nodes.append(stack.enter_context(node))
            buses = [node.command[node.command.index("--cluster-port") + 1] for node in self.nodes]
            addresses = [f"127.0.0.1:{node.port}@{bus}" for node, bus in zip(self.nodes, buses, strict=True)]
            subprocess.run(
                [find("redis-cli"), "--cluster", "create", *addresses, "--cluster-yes"], check=True, capture_output=True
            )
            for node in self.nodes:
                _await(partial(_is_whole, node.port))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        """The port of one node."""
        return self.nodes[0].port


class Sentinel(Server):
    """A sentinel that watches one master, named ``shop``."""

    def __init__(self, data: Path, master: Redis) -> None:
        super().__init__("sentinel", data, None)
        self.command = [str(find("redis-server")), str(self.data / "sentinel.conf"), "--sentinel"]
        self._text = (
            f"port {self.port}\nbind 127.0.0.1\ndir {self.data}\n"
            f"sentinel monitor shop 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds shop 1000\n"
        )

    def start(self, timeout: float = 30.0) -> None:
        """Start with the configuration file that a sentinel keeps its state in."""
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / "sentinel.conf").write_text(self._text)
        super().start(timeout)


@contextmanager
def sentinel_and_master(folder: Path) -> Iterator[Sentinel]:
    """Start a master, a replica of it and a sentinel, and wait until the sentinel knows them both."""
    with Redis(folder / "master" / "redis") as master:
        replica = Redis(folder / "replica" / "redis")
        replica.command += ["--replicaof", "127.0.0.1", str(master.port)]
        with replica, Sentinel(folder / "sentinel" / "data", master) as sentinel:
            with _finder(sentinel) as finder:
                _await(lambda: finder.discover_slaves("shop") != [])
            yield sentinel


@contextmanager
def _finder(sentinel: Sentinel) -> Iterator[redis.Sentinel]:
    finder = redis.Sentinel([("127.0.0.1", sentinel.port)])
    yield finder
    for client in finder.sentinels:
        client.close()


def _is_whole(port: int) -> bool:
    with redis.Redis(port=port) as client:
        return bool(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")


def _await(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the servers did not come up"
        time.sleep(0.05)
