"""The contract of a probe, and the guard that keeps a broken probe from harming the app."""

from __future__ import annotations

import logging
from typing import ClassVar, Protocol

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store.writer import Counter, Gauge, Writer

log = logging.getLogger("fastapi_headroom")


class Probe(Protocol):
    """One concern that is measured. ``sample`` runs about once a second, at rest every two, on a thread of its own."""

    name: ClassVar[str]
    """The stem."""
    metrics: ClassVar[tuple[Metric, ...]]
    """The rows of the catalog that it may write."""
    guard: Guard
    """Takes what its hooks raise."""

    def bind(self, writer: Writer) -> None:
        """Resolve handles and attach hooks. Called when the worker first serves, and again after a fork:
        then every handle kept from before is dead and hooks that are attached already stay attached once."""

    def sample(self) -> None:
        """Write gauges. No await, no network."""

    def close(self) -> None:
        """Detach every hook and put every patched thing back. Idempotent."""


class Guard:
    """Swallows what a probe's hook raises: counts it, logs the first, and turns ``headroom_probe_up`` to 0."""

    __slots__ = ("_errors", "_logged", "_up", "probe")

    def __init__(self, probe: str) -> None:
        self.probe = probe
        self._errors: Counter | None = None
        self._up: Gauge | None = None
        self._logged = False

    def bind(self, writer: Writer) -> None:
        """Resolve the handles and report the probe as up."""
        self._errors = writer.counter(catalog.PROBE_ERRORS, self.probe)
        self._up = writer.gauge(catalog.PROBE_UP, self.probe)
        self._up.set(1.0)

    def failed(self, error: BaseException) -> None:
        """Take note of an error that must not reach the app. Never raises."""
        try:
            if self._errors is not None and self._up is not None:
                self._errors.inc()
                self._up.set(0.0)
            if not self._logged:
                self._logged = True
                log.error(
                    "fastapi-headroom: the %s probe failed and may be missing data: %s: %s; the app is not affected",
                    self.probe,
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
        except Exception:  # the last line of defence: nothing of ours may reach the app
            pass
