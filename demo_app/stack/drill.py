"""Switches a fault on and off while the demo runs, and proves that its alert came and went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from demo_app.faults import FAULTS
from demo_app.stack.stack import Stack

WATCHDOG = "HeadroomWatchdog"
ARRIVAL, RESOLUTION, WATCHDOG_ARRIVAL = (90.0, 1_800.0), (60.0, 3_600.0), (15.0, 0.0)
"""Longest waits, in seconds: a part that no scale shortens (a job must really grow old), and one that it divides."""
PAUSE = 0.5
"""Seconds between two looks at the inbox."""


class Drill:
    """One run with a time limit. ``begin`` is the moment from which the report counts its seconds."""

    def __init__(self, stack: Stack, duration: float, say: Callable[[str], None]) -> None:
        self._stack, self._duration, self._say = stack, duration, say
        self.begin = time.time()
        self._told: dict[str, bool] = {}

    def run(self, fault: str | None) -> bool:
        """Run for the duration; return whether all went as it should.

        With a fault: its alert was delivered to the inbox after the fault was switched on, and resolved after it
        was switched off, and no other of its severity came but those that the fault lists. The run is stretched for
        that, within bounds. Without: only the Watchdog arrived.
        """
        if fault is None:
            self._watch(lambda: False, self._duration)
            return self._quiet()
        names = FAULTS[fault].alerts
        self._say(f"healthy for {self._duration / 3:.0f} s")
        self._watch(lambda: False, self._duration / 3)
        already = [alert for alert in self._alerts(names) if alert["resolved"] is None]
        if already:
            self._say(f"{already[0]['name']} fires although all faults are off")
        switched_on = time.time()
        self._stack.switches.set(fault, True)
        self._say(f"fault {fault} on: {FAULTS[fault].what}")
        delivered = self._watch(lambda: bool(self._since(names, switched_on)), self._longest(ARRIVAL))
        if delivered:
            self._watch(lambda: False, self._duration / 3 - (time.time() - switched_on))
        switched_off = time.time()
        self._stack.switches.set(fault, False)
        self._say(f"fault {fault} off")
        if not delivered:
            self._say(f"no {' or '.join(names)} arrived")
            return False
        self._watch(lambda: False, self._duration - (time.time() - self.begin))
        over = self._watch(lambda: self._over(names, switched_off), self._longest(RESOLUTION))
        return over and not already and not self._others(fault, switched_on)

    def report(self) -> str:
        """Return the table of what arrived, with seconds since the beginning."""
        lines = [f"{'alert':<34}{'severity':<10}{'arrived':>9}{'resolved':>10}  about"]
        for alert in self._stack.received():
            about = {key: it for key, it in alert["labels"].items() if key not in _OBVIOUS}
            arrived, resolved = self._seconds(alert["arrived"]), self._seconds(alert["resolved"])
            words = ", ".join(f"{key}={it}" for key, it in about.items())
            lines.append(f"{alert['name']:<34}{alert['severity']:<10}{arrived:>9}{resolved:>10}  {words}")
        return "\n".join(lines)

    def _watch(self, reached: Callable[[], bool], seconds: float) -> bool:
        """Return True as soon as a condition holds, False after so many seconds; tell what arrives meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._stack.check()
            self._tell()
            if reached():
                return True
            time.sleep(PAUSE)
        return False

    def _longest(self, wait: tuple[float, float]) -> float:
        fixed, scaled = wait
        return fixed + scaled / self._stack.scale

    def _tell(self) -> None:
        for alert in self._stack.received():
            key, over = f"{alert['labels']}{alert['started']}", alert["resolved"] is not None
            if self._told.get(key) == over or alert["name"] == WATCHDOG:
                continue
            self._told[key] = over
            words = f"resolved: {alert['name']}" if over else f"firing: {alert['name']}: {alert['description']}"
            self._say(words)

    def _alerts(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        return [alert for alert in self._stack.received() if alert["name"] in names]

    def _since(self, names: tuple[str, ...], moment: float) -> list[dict[str, Any]]:
        return [alert for alert in self._alerts(names) if alert["arrived"] > moment]

    def _others(self, fault: str, moment: float) -> bool:
        """Return whether alerts came that this fault should not bring, and tell them."""
        names, beside = FAULTS[fault].alerts, FAULTS[fault].beside
        if beside is None:
            return False
        severities = {alert["severity"] for alert in self._since(names, moment)}
        came = [alert for alert in self._stack.received() if alert["arrived"] > moment]
        others = {it["name"] for it in came if it["severity"] in severities} - {*names, *beside, WATCHDOG}
        for name in sorted(others):
            self._say(f"{name} came as well, and {fault} should not bring it")
        return bool(others)

    def _over(self, names: tuple[str, ...], moment: float) -> bool:
        ends = [alert["resolved"] for alert in self._alerts(names)]
        return None not in ends and any(end > moment for end in ends)

    def _quiet(self) -> bool:
        if not self._watch(lambda: bool(self._alerts((WATCHDOG,))), self._longest(WATCHDOG_ARRIVAL)):
            self._say("the Watchdog did not arrive: the way from Prometheus to the inbox is broken")
            return False
        return {alert["name"] for alert in self._stack.received()} == {WATCHDOG}

    def _seconds(self, moment: float | None) -> str:
        return "-" if moment is None else f"{moment - self.begin:+.0f} s"


_OBVIOUS = {"alertname", "severity", "job", "instance", "environment", "board"}
