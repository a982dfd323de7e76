"""What ``init`` and ``init_worker`` say to a wrong argument, and that nothing of the attempt is left."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

import fastapi_headroom as headroom
from fastapi_headroom.errors import SettingsError


@pytest.mark.parametrize("wrong", [{"pools": {"primary": 3}}, {"pools": ["primary"]}, {"caches": {"main": "redis"}}])
def test_a_failed_init_leaves_nothing_behind(
    tmp_path: Path, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The settings of an init that raised are forgotten: the corrected one's count, and nothing is warned of."""
    caplog.set_level(logging.WARNING)
    app = FastAPI()
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        headroom.init(app, directory=tmp_path / "first", **wrong)
    handle = headroom.init(app, directory=tmp_path / "second")
    try:
        assert handle.settings.directory == tmp_path / "second"
        assert not caplog.records
    finally:
        handle.shutdown()


def test_a_failed_init_of_a_second_app_leaves_the_first_alone(tmp_path: Path) -> None:
    """An app that is measured goes on being measured when the init of another one raises."""
    app = FastAPI()
    handle = headroom.init(app, directory=tmp_path)
    try:
        with pytest.raises(SettingsError):
            headroom.init(FastAPI(), pools={"primary": 3})
        assert headroom.init(app) is handle
    finally:
        handle.shutdown()


def test_what_is_no_worker_is_named_with_the_remedy() -> None:
    """``init_worker`` of something else says what it takes, whether Celery is installed or not."""
    with pytest.raises(SettingsError, match=r"Celery app, or a Dramatiq or TaskIQ broker, got FastAPI: .* without one"):
        headroom.init_worker(FastAPI())
