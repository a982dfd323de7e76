"""Receives Alertmanager's webhooks and shows them: a page for people, ``/alerts`` as JSON for programs."""

from __future__ import annotations

import html
import json
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>Inbox</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#1c2733}}table{{border-collapse:collapse;width:100%}}
td,th{{padding:.4rem .8rem;border-bottom:1px solid #dde3ea;text-align:left;vertical-align:top}}
.firing{{color:#b42318;font-weight:600}}.resolved{{color:#1a7f4b}}</style>
<h1>Alerts received</h1><table><tr><th>state<th>alert<th>severity<th>what<th>arrived<th>resolved</tr>{rows}</table>
"""


@dataclass
class Received:
    """One alert from its first notification on. Times are seconds since 1970, when the inbox heard of it."""

    name: str
    severity: str
    labels: dict[str, str]
    summary: str
    description: str
    started: float
    """When Prometheus says that it began to fire."""
    arrived: float
    resolved: float | None = None


@dataclass
class Inbox:
    """The alerts received so far, at most ``limit``; the oldest are forgotten first."""

    limit: int = 1_000
    _alerts: dict[tuple[str, str], Received] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def receive(self, notification: dict[str, Any]) -> None:
        """Take in one webhook. Raises KeyError when it is none of Alertmanager's."""
        with self._lock:
            for alert in notification["alerts"]:
                self._take(alert)
            for key in list(self._alerts)[: -self.limit]:
                del self._alerts[key]

    def alerts(self) -> list[Received]:
        """Return what was received, oldest first."""
        with self._lock:
            return list(self._alerts.values())

    def _take(self, alert: dict[str, Any]) -> None:
        labels, notes = alert["labels"], alert.get("annotations", {})
        known = self._alerts.get(key := (alert["fingerprint"], alert["startsAt"]))
        if known is None:
            known = self._alerts[key] = Received(
                name=labels.get("alertname", ""),
                severity=labels.get("severity", ""),
                labels=labels,
                summary=notes.get("summary", ""),
                description=notes.get("description", ""),
                started=datetime.fromisoformat(alert["startsAt"]).timestamp(),
                arrived=time.time(),
            )
        if alert["status"] == "resolved" and known.resolved is None:
            known.resolved = time.time()


def page(alerts: list[Received]) -> str:
    """Return the page: newest first."""
    rows = []
    for alert in reversed(alerts):
        state = "firing" if alert.resolved is None else "resolved"
        cells = (alert.name, alert.severity, alert.description, _clock(alert.arrived), _clock(alert.resolved))
        rows.append(f'<tr><td class="{state}">{state}' + "".join(f"<td>{html.escape(cell)}" for cell in cells))
    return _PAGE.format(rows="\n".join(rows) or "<tr><td colspan=6>none yet")


def make_server(host: str, port: int, inbox: Inbox) -> ThreadingHTTPServer:
    """Return a server for the inbox."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = min(int(self.headers.get("Content-Length", 0)), 1_000_000)
                inbox.receive(json.loads(self.rfile.read(length)))
            except (ValueError, KeyError, TypeError) as error:
                self.send_error(400, f"not a webhook of Alertmanager: {type(error).__name__}")
                return
            self._answer("ok", "text/plain")

        def do_GET(self) -> None:
            if self.path == "/alerts":
                self._answer(json.dumps([asdict(alert) for alert in inbox.alerts()]), "application/json")
            elif self.path == "/":
                self._answer(page(inbox.alerts()), "text/html; charset=utf-8")
            else:
                self.send_error(404)

        def _answer(self, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            if args and str(args[0]).startswith("POST"):
                super().log_message(format, *args)

    return ThreadingHTTPServer((host, port), Handler)


def _clock(moment: float | None) -> str:
    return "" if moment is None else datetime.fromtimestamp(moment, UTC).astimezone().strftime("%H:%M:%S")
