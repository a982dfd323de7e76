"""The pytest plugin: a fixture ``assert_no_blocking``. Loaded by every pytest run, so it imports what it needs late."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

NAME = "assert_no_blocking"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{NAME}(threshold_ms=50): fail when the test holds an event loop for longer; implies the fixture"
    )


@pytest.fixture
def assert_no_blocking() -> Any:
    """Fail the test when it holds an event loop for 50 ms or longer. The value is ``testing.assert_no_blocking``."""
    from fastapi_headroom import testing

    return testing.assert_no_blocking


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch the test itself, not the set-up of its fixtures; as part of the call, so that it fails and is no error."""
    marker = item.get_closest_marker(NAME)
    if marker is None and NAME not in getattr(item, "fixturenames", ()):
        return (yield)
    from fastapi_headroom import testing

    with testing.assert_no_blocking(*marker.args if marker else (), **marker.kwargs if marker else {}):
        return (yield)
