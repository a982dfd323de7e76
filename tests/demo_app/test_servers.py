"""When a server of the stack counts as started."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from demo_app.stack.process import free_port
from demo_app.stack.servers import Postgres


@pytest.mark.parametrize(("answer", "ready"), [(b"E", False), (b"", False), (b"R", True)])
def test_postgresql_is_ready_when_it_lets_somebody_in(tmp_path: Path, answer: bytes, ready: bool) -> None:
    """A port that accepts is not enough: while PostgreSQL starts it refuses who comes, in so many words."""
    with socket.create_server(("127.0.0.1", 0)) as starting:

        def refuse_or_let_in() -> None:
            connection, _ = starting.accept()
            with connection:
                hello = connection.recv(1024)
                assert len(hello) == int.from_bytes(hello[:4], "big")
                connection.sendall(answer)

        serving = threading.Thread(target=refuse_or_let_in)
        serving.start()
        assert Postgres(tmp_path / "postgres", port=starting.getsockname()[1])._is_ready() is ready
        serving.join()


def test_a_free_port_is_given_once_and_not_one_that_a_connection_may_take() -> None:
    """Each is another one that can be bound, outside of the system's own range; one that is taken is left out."""
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in ports if low <= port <= high] or low < 32_000
    with socket.create_server(("127.0.0.1", ports[-1] + 1)) as taken:
        assert free_port() != taken.getsockname()[1]
