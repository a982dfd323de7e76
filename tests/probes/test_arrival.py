"""The wait before the app is called: by the kernel after a hold, and by the proxy's header where it is trusted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from fastapi_headroom import holds
from fastapi_headroom.ledger import ACCEPT_QUEUE, Ledger
from fastapi_headroom.probes import arrival
from tests.support.measured import Measured

pytestmark = pytest.mark.alone

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"t=1799999999.750", 0.25),
        (b"1799999999.750", 0.25),
        (b"t=1799999999750", 0.25),
        (b" T = 1799999999750000 ", 0.25),
        (b"1799999999750000000", 0.25),
        (b"t=1799999400.5", 599.5),
        (b"t=1799999399", 0.0),  # eleven minutes
        (b"t=1800000001", 0.0),  # the future
        (b"t=0", 0.0),
        (b"t=-1799999999", 0.0),
        (b"", 0.0),
        (b"yesterday", 0.0),
        (b"t=nan", 0.0),
        (b"9" * 400, 0.0),
        (b"t=1799999999.75; t=1799999000", 0.0),
    ],
)
def test_the_header_is_read_in_all_units(value: bytes, seconds: float) -> None:
    """Seconds, milli-, micro- and nanoseconds are told apart; what is absurd is no wait."""
    assert arrival.since_proxy(value, NOW) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize("trusted", [True, False])
async def test_the_header_counts_where_it_is_trusted(measure: Callable[..., Measured], trusted: bool) -> None:
    """A request that was with the proxy for 2 s has them in accept_queue and latency, and not in its duration; where
    the header is not trusted, which is the default, it is as if it was not there."""
    app = FastAPI()

    @app.get("/")
    async def handler() -> str:
        return "ok"

    measured = measure(app, trust_request_start=trusted) if trusted else measure(app)
    async with measured.client() as client:
        began = time.time()
        await client.get("/", headers={"X-Request-Start": f"t={began - 2:.3f}"})
        took = time.time() - began
    least, most = (2.0, 2.0 + took) if trusted else (0.0, 0.0)
    queued = measured.stages("/").get("accept_queue", 0.0)
    assert least - 0.001 <= queued <= most + 0.001
    latency = measured.value("headroom_request_latency_seconds_sum", http_route="/")
    assert latency == pytest.approx(queued + measured.seconds("/"))
    assert measured.seconds("/") <= took


class Cycle:
    """What uvicorn's ``receive`` belongs to."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport

    async def receive(self) -> dict[str, Any]:
        return {}


async def _bare() -> dict[str, Any]:
    return {}


class Broken:
    """A transport that has its own mind."""

    def get_extra_info(self, name: str) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize("receive", [_bare, Cycle(None).receive, Cycle(object()).receive, Cycle(Broken()).receive, 7])
async def test_a_server_without_a_transport_has_no_queue(receive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test clients and other servers, and transports that fail, give 0 and no error, after a hold too."""
    monkeypatch.setattr(holds, "until", float("inf"))
    now = time.perf_counter()
    holds.note_step(now - 1.0, now)
    ledger = Ledger()
    arrival.note(ledger, {"headers": []}, receive, True)
    assert ledger.seconds[ACCEPT_QUEUE] == 0.0
    assert not ledger.waited


async def test_the_queue_reaches_no_further_back_than_the_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept-alive connection whose last data is older than the hold, as pipelined ones have, waited that at most."""
    monkeypatch.setattr(arrival, "seconds_since_data", lambda transport: 3600.0)
    monkeypatch.setattr(holds, "until", float("inf"))
    now = time.perf_counter()
    holds.note_step(now - 0.2, now)
    ledger = Ledger()
    arrival.note(ledger, {"headers": []}, Cycle(object()).receive, False)
    assert 0.2 - 0.05 <= ledger.seconds[ACCEPT_QUEUE] <= 0.2 + (time.perf_counter() - now) + 0.05
