"""The long proofs may take long, however they are started."""

from __future__ import annotations

from pathlib import Path

import pytest

TIMEOUT = 3600.0
"""Seconds for one of them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each of them an hour instead of the two minutes of a test."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT))
