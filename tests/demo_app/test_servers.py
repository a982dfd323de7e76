"""When a server of the stack counts as started."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

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
