"""Fixtures that the tests of the probes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.measured import Measured


@pytest.fixture
def measure() -> Iterator[Callable[..., Measured]]:
    """Put apps under probes that are closed afterwards."""
    opened: list[Measured] = []

    def make(app: Any, **arguments: Any) -> Measured:
        opened.append(Measured(app, **arguments))
        return opened[-1]

    yield make
    for measured in opened:
        measured.probe.close()
