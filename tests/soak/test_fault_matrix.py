"""The fault matrix: every fault of the demo, under load, with alerts delivered through a real Alertmanager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from demo_app.faults import FAULTS
from tests.support.serving import ROOT


def run_demo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo_app", "demo", "--home", str(home), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.soak
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_brings_its_alert_and_healing_ends_it(fault: str, tmp_path: Path) -> None:
    """The fault's alert is delivered to the inbox after it was switched on, and resolves after it was healed."""
    done = run_demo(tmp_path / "demo", "--duration", "90", "--fault", fault)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.soak
def test_a_healthy_run_under_load_brings_nothing_but_the_watchdog(tmp_path: Path) -> None:
    """Three minutes of load without a fault deliver no alert but the Watchdog."""
    done = run_demo(tmp_path / "demo", "--duration", "180")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
