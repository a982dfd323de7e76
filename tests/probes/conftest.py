"""Fixtures that the tests of the probes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
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


@pytest.fixture
def writer() -> Writer:
    """A store in memory."""
    return Writer.in_memory()


@pytest.fixture
def pool_probe(request: pytest.FixtureRequest, writer: Writer) -> Iterator[PoolProbe]:
    """The pool probe, which must not have failed by the end; ``indirect`` parameters are its settings."""
    probe = PoolProbe(load({}, **getattr(request, "param", {})))
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="pool") == 1.0
    probe.close()
