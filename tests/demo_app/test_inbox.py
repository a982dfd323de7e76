"""The inbox over HTTP, fed as Alertmanager feeds it."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from demo_app.inbox import Inbox, make_server

STARTED = "2026-03-01T10:00:00.5Z"


@pytest.fixture
def address() -> Iterator[str]:
    """A running inbox."""
    server = make_server("127.0.0.1", 0, Inbox(limit=3))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def post(address: str, body: Any) -> None:
    """Send a webhook."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=5).close()


def notification(status: str, name: str = "HeadroomPoolWait", started: str = STARTED) -> dict[str, Any]:
    """Return one alert as Alertmanager's version 4 webhook carries it."""
    labels = {"alertname": name, "severity": "warning", "job": "shop"}
    notes = {"summary": "Requests wait.", "description": "<b>0.3</b> s"}
    alert = {"status": status, "labels": labels, "annotations": notes, "startsAt": started, "fingerprint": name}
    return {"version": "4", "status": status, "alerts": [alert]}


def received(address: str) -> list[dict[str, Any]]:
    """Return what the inbox says it has."""
    with urllib.request.urlopen(f"{address}/alerts", timeout=5) as response:
        return list(json.load(response))


def test_an_alert_arrives_and_resolves(address: str) -> None:
    """One alert is one entry: repeated notifications change nothing, the resolution is noted with its time."""
    post(address, notification("firing"))
    post(address, notification("firing"))
    (alert,) = received(address)
    assert (alert["name"], alert["severity"], alert["resolved"]) == ("HeadroomPoolWait", "warning", None)
    assert alert["started"] == 1_772_359_200.5
    post(address, notification("resolved"))
    (alert,) = received(address)
    assert alert["resolved"] >= alert["arrived"]


def test_an_alert_that_fires_again_is_another_entry(address: str) -> None:
    """The same labels with another start are a new alert."""
    post(address, notification("firing"))
    post(address, notification("firing", started="2026-03-01T11:00:00Z"))
    assert len(received(address)) == 2


def test_the_oldest_are_forgotten(address: str) -> None:
    """No more than the limit is kept, the newest of them."""
    for number in range(5):
        post(address, notification("firing", name=f"A{number}"))
    assert [alert["name"] for alert in received(address)] == ["A2", "A3", "A4"]


def test_the_page_shows_alerts_as_text(address: str) -> None:
    """People see the alert and its state; markup in a description stays text."""
    post(address, notification("firing"))
    with urllib.request.urlopen(address, timeout=5) as response:
        page = response.read().decode()
    assert "HeadroomPoolWait" in page and "&lt;b&gt;0.3&lt;/b&gt; s" in page and "<b>0.3" not in page


@pytest.mark.parametrize("body", [{}, [], {"alerts": [{}]}, {"alerts": 1}, "text"])
def test_what_is_no_webhook_is_refused(address: str, body: Any) -> None:
    """Something else than a webhook is answered with 400, and the inbox goes on."""
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(address, body)
    assert received(address) == []
