"""arq's own tests, with the release of today and the redis-py that it wants, which no other test can run with."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.serving import ROOT

FOLDER = Path(sys.prefix) / "arq"


@pytest.mark.timeout(500)  # many tests in one
@pytest.mark.skipif(find_spec("arq") is not None, reason="arq is in this environment: its tests run by themselves")
def test_arq_passes_the_queue_kit_and_its_own_tests() -> None:
    """With arq and an older redis-py the adapter passes the kit and what its hooks promise."""
    assert (FOLDER / "arq").is_dir(), "make puts arq there: make test"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "arq",
         "tests/probes/arq", "tests/probes/test_queue_kit.py", "tests/probes/test_queue_pollers.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(FOLDER)}, capture_output=True, text=True, timeout=450,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
