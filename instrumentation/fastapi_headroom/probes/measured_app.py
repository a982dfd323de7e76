"""What the request probe knows of one app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi_headroom.probes.request_series import Table
from fastapi_headroom.tracing.apps import telemetry_is_configured


class MeasuredApp:
    """What the probe knows of one app."""

    __slots__ = ("app", "new", "running", "served_by", "stand_aside", "table")

    def __init__(self, app: Callable[[], Any], served_by: Any) -> None:
        self.app = app
        self.served_by = served_by
        """What the server calls: None for the app itself."""
        self.stand_aside = False
        self.new = True
        """It has served no request yet."""
        self.table: Table | None = None
        """Where its requests are counted while a loop is ``running``; None when a request must ask ``_table_for``."""
        self.running: Callable[[], bool] = bool
        """Whether the loop runs that ``table`` was told for. Which one runs would be a system call (CPython 3.11)."""

    def telemetry_dormant(self, keep: bool, owns_tracing: bool) -> bool:
        """Return whether FastAPI's own telemetry may be told to stand aside.

        It costs CPU on every request even when it has nothing to report to. It stays when a setting says so, when
        the user configured it for this app, or when there is a provider that it reports to and we do not.
        """
        app = self.app()
        config = getattr(app, "_telemetry", None)
        native = getattr(app, "_native_telemetry", None)
        if keep or not isinstance(config, dict) or native is None or telemetry_is_configured(app):
            return False
        return owns_tracing or not native.enabled()
