"""Requests and responses with headers as nobody should send them: counted, bounded, and passed on as they are."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.measured import Measured, uvicorn_serving

SECRET = "correct-horse-battery"
NAMES = [b"accept-encoding", b"Accept-Encoding", b"content-length", b"x-headroom-timing", b"content-type", b"", b"\xff"]
VALUES = [
    b"", b"gzip", b"gzip;q=", b"*;q=0", b"\xff\xfe\x00", "gzïp".encode(), b"," * 70_000, b"a" * 1_000_000, b"9" * 5000,
    b"-1", b"1_000", "१२३".encode(), SECRET.encode(), b"text/plain;" * 9000, b"text/html", bytearray(b"gzip"),
]  # fmt: skip


def some(dice: random.Random) -> list[tuple[Any, Any]]:
    """Return up to six headers, names repeated at will."""
    return [(dice.choice(NAMES), dice.choice(VALUES)) for _ in range(dice.randrange(7))]


@pytest.mark.parametrize("seed", range(4))
async def test_no_header_breaks_or_bloats_the_measuring(measure: Callable[..., Measured], seed: int) -> None:
    """Three hundred requests and responses with rubbish headers: none fails, no series is new, sums stay sane."""
    dice = random.Random(seed)
    answers: list[list[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = some(dice)
        answers.append(list(headers))
        given: Any = dice.choice([headers, tuple(headers), iter(headers)])
        await send({"type": "http.response.start", "status": dice.choice([200, 204, 206, 304, 404]), "headers": given})
        for _ in range(dice.randrange(3)):
            await send({"type": "http.response.body", "body": b"x" * 700, "more_body": True})
        await send({"type": "http.response.body", "body": b"x" * 700})

    measured = measure(app, server_timing_secret=SECRET)
    sizes: list[int] = []
    for number in range(300):
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        scope = {"type": "http", "method": dice.choice(["GET", "HEAD", "POST", "BREW"]), "path": f"/{number}"}
        asked = some(dice)
        await measured.app({**scope, "headers": asked, "query_string": b""}, receive, send)
        received = list(sent[0]["headers"])
        shown = next((value for name, value in asked if name.lower() == b"x-headroom-timing"), None)
        assert received[: len(answers[-1])] == answers[-1]
        assert len(received) == len(answers[-1]) + (shown == SECRET.encode())
        if number >= 150:
            sizes.append(len(measured.writer.samples()))
    assert sizes[-1] - sizes[0] < 60  # a status or method that comes late, no path and no header
    assert measured.nonzero("headroom_probe_errors_total") == {}
    assert sum(measured.nonzero("headroom_requests_total").values()) == 300
    assert sum(measured.nonzero("http_server_request_body_size_bytes_sum").values()) < 1e12


def test_raw_rubbish_over_a_socket_leaves_the_server_serving(measure: Callable[..., Measured]) -> None:
    """Repeated, non-latin and huge headers over TCP: uvicorn answers what it takes, and nothing of ours fails."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"x" * 2000})

    measured = measure(app, server_timing_secret=SECRET)
    lines = [
        b"accept-encoding: identity\r\naccept-encoding: gzip;q=0\r\nAccept-Encoding: br",
        "x-headroom-timing: пароль".encode(),
        b"accept-encoding: " + b"gzip," * 10_000,
        b"x-headroom-timing: " + SECRET.encode(),
    ]
    answers = []
    with uvicorn_serving(measured.app) as port:
        for line in lines:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + line + b"\r\n\r\n")
                answer = b""
                while piece := connection.recv(65536):
                    answer += piece
            answers.append(answer.lower())
    assert all(answer.startswith(b"http/1.1 200") for answer in answers)
    assert [b"server-timing: " in answer for answer in answers] == [False, False, False, True]
    assert measured.nonzero("headroom_response_compressible_bytes_total") == {("_unmatched",): 4000}
    assert measured.nonzero("headroom_probe_errors_total") == {}
