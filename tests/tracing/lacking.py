"""The app in a process where the package named by TEST_WITHOUT cannot be imported."""

from __future__ import annotations

import os
import sys

if missing := os.environ.get("TEST_WITHOUT"):
    sys.modules[missing] = None  # type: ignore[assignment]

from tests.tracing.app import app

__all__ = ["app"]
