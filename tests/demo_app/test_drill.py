"""What a run with a fault accepts as proof: the alert came after the fault was switched on, and went after it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from demo_app.faults import FAULTS, Switches
from demo_app.inbox import Inbox
from demo_app.stack.drill import Drill

BLOCKED = "HeadroomEventLoopBlocked"


class ScriptedStack:
    """A stack whose inbox hears what the test wants as the fault is switched. ``scale`` makes waits short."""

    scale = 1_800.0

    def __init__(
        self, run: Path, *, on: list[str], off: list[str], before: tuple[str, ...] = (), early: bool = False
    ) -> None:
        self.switches, self.inbox = Switches(run / "faults.json"), Inbox()
        self._on, self._off = on, off
        self._was_on, self._early = False, early
        for name in before:
            self._hear(name, "firing")

    def check(self) -> None:
        """Play the part that belongs to the state of the switch."""
        is_on = self.switches.on("loop_block")
        if is_on and not self._was_on:
            for name in self._on:
                self._hear(name, "firing")
        if is_on and self._early:
            for name in self._off:
                self._hear(name, "resolved")
        if self._was_on and not is_on:
            for name in self._off:
                self._hear(name, "resolved")
        self._was_on = is_on

    def received(self) -> list[dict[str, Any]]:
        """Return what the inbox has."""
        return [asdict(alert) for alert in self.inbox.alerts()]

    def _hear(self, name: str, status: str) -> None:
        labels = {"alertname": name, "severity": "warning"}
        alert = {"status": status, "labels": labels, "startsAt": "2026-03-01T10:00:00Z", "fingerprint": name}
        self.inbox.receive({"alerts": [alert]})


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the drill wait a moment where it would wait minutes."""
    monkeypatch.setattr("demo_app.stack.drill.ARRIVAL", (0.3, 0.0))
    monkeypatch.setattr("demo_app.stack.drill.RESOLUTION", (0.3, 0.0))
    monkeypatch.setattr("demo_app.stack.drill.WATCHDOG_ARRIVAL", (0.3, 0.0))
    monkeypatch.setattr("demo_app.stack.drill.PAUSE", 0.02)


def drill(stack: ScriptedStack, fault: str | None) -> tuple[bool, str]:
    """Run a drill of a second; return whether it passed, and its report."""
    run = Drill(stack, 0.9, lambda _: None)  # type: ignore[arg-type]
    return run.run(fault), run.report()


def test_an_alert_that_comes_and_goes_passes(tmp_path: Path) -> None:
    """The fault's alert arrives and resolves; another one that goes on does not matter. The switch ends off."""
    stack = ScriptedStack(tmp_path, on=[BLOCKED, "HeadroomEventLoopLag"], off=[BLOCKED])
    passed, report = drill(stack, "loop_block")
    assert passed and BLOCKED in report and "HeadroomEventLoopLag" in report
    assert stack.switches.all_on() == frozenset()


@pytest.mark.parametrize(
    ("on", "off", "before"),
    [
        ([], [], ()),
        (["HeadroomEventLoopLag"], ["HeadroomEventLoopLag"], ()),
        ([BLOCKED], [], ()),
        ([BLOCKED], [BLOCKED], (BLOCKED,)),
        ([], [BLOCKED], (BLOCKED,)),
    ],
    ids=["nothing arrives", "another alert arrives", "it does not resolve", "it fired before", "only before"],
)
def test_anything_else_fails(tmp_path: Path, on: list[str], off: list[str], before: tuple[str, ...]) -> None:
    """No alert, a wrong one, one that stays, or one that fired already is no proof; the switch ends off."""
    stack = ScriptedStack(tmp_path, on=on, off=off, before=before)
    assert not drill(stack, "loop_block")[0]
    assert stack.switches.all_on() == frozenset()


@pytest.mark.parametrize(("beside", "passed"), [((), False), (("HeadroomEventLoopLag",), True), (None, True)])
def test_an_alert_of_the_same_severity_must_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: tuple[str, ...] | None, passed: bool
) -> None:
    """An alert that the fault should not bring fails the drill, unless it is listed or nobody watches."""
    monkeypatch.setitem(FAULTS, "loop_block", replace(FAULTS["loop_block"], beside=beside))
    stack = ScriptedStack(tmp_path, on=[BLOCKED, "HeadroomEventLoopLag"], off=[BLOCKED])
    assert drill(stack, "loop_block")[0] is passed


def test_an_alert_that_resolves_while_the_fault_lasts_fails(tmp_path: Path) -> None:
    """What goes away although the fault is still on proves nothing about healing."""
    assert not drill(ScriptedStack(tmp_path, on=[BLOCKED], off=[BLOCKED], early=True), "loop_block")[0]


@pytest.mark.parametrize(
    ("before", "passed"),
    [(("HeadroomWatchdog",), True), ((), False), (("HeadroomWatchdog", BLOCKED), False)],
    ids=["watchdog", "nothing", "another alert"],
)
def test_a_healthy_run_brings_the_watchdog_only(tmp_path: Path, before: tuple[str, ...], passed: bool) -> None:
    """Without a fault the Watchdog must have arrived, and nothing else."""
    assert drill(ScriptedStack(tmp_path, on=[], off=[], before=before), None)[0] is passed
