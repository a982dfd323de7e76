"""The names that users import."""

from __future__ import annotations

import subprocess
import sys


def test_public_names_are_shown_before_they_are_used() -> None:
    """``dir()``, and with it completion in a shell, shows the public names of a package that was only imported."""
    code = "import fastapi_headroom as h, sys; assert 'fastapi_headroom.wiring' not in sys.modules; print(*dir(h))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"init", "init_worker", "autosize", "cache_result", "cache_invalidated"} <= set(done.stdout.split())
