"""The switches of the faults: one file, seen by all processes of the shop."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_app.faults import FAULTS, Switches


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file for the switches, in a folder that is not there yet."""
    return tmp_path / "run" / "faults.json"


def test_a_switch_is_seen_by_another_process(path: Path) -> None:
    """What one object switches, another one with the same file sees, on and off."""
    operator, worker = Switches(path), Switches(path, interval=0)
    assert not worker.on("loop_block")
    operator.set("loop_block", True)
    operator.set("cache_off", True)
    assert worker.on("loop_block") and worker.on("cache_off") and not worker.on("error_burst")
    operator.set("loop_block", False)
    assert not worker.on("loop_block") and worker.on("cache_off")
    operator.clear()
    assert worker.all_on() == frozenset()


def test_a_switch_is_not_looked_up_on_every_request(path: Path) -> None:
    """Within the interval the file is not asked again, so a hot path pays for a clock read only."""
    worker = Switches(path, interval=3600)
    assert not worker.on("loop_block")
    Switches(path).set("loop_block", True)
    assert not worker.on("loop_block")
    assert worker.all_on() == {"loop_block"}


def test_an_unknown_fault_is_refused(path: Path) -> None:
    """A misspelt fault is an error and leaves no file behind."""
    with pytest.raises(KeyError):
        Switches(path).set("no_such_fault", True)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "null", '["no_such_fault"]', '[["loop_block"]]', "\x00"])
def test_a_broken_file_means_off(path: Path, text: str) -> None:
    """Whatever lies in the file, the shop goes on; what is no fault is not on."""
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert Switches(path).all_on() == frozenset()


def test_each_fault_names_alerts_that_are_shipped() -> None:
    """Every fault expects an alert, and that alert is in the shipped rules."""
    rules = "".join(path.read_text() for path in (Path(__file__).parents[2] / "alerts").glob("*.rules.yml"))
    for fault in FAULTS.values():
        assert fault.alerts
        for alert in (*fault.alerts, *(fault.beside or ())):
            assert f"alert: {alert}\n" in rules
