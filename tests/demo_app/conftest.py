"""What the tests of the demo share."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_app import faults


@pytest.fixture(autouse=True)
def switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> faults.Switches:
    """Switches of this test alone, seen at once, whatever a demo of this checkout does meanwhile."""
    own = faults.Switches(tmp_path / "run" / "faults.json", interval=0)
    monkeypatch.setattr(faults, "switches", own)
    return own
