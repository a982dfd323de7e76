"""Errors of fastapi-headroom. Every message carries what was found and what to do about it."""

from __future__ import annotations


class HeadroomError(Exception):
    """Base of all errors that fastapi-headroom raises."""


class SettingsError(HeadroomError):
    """A setting is unknown or has a value that cannot be used."""


class StoreError(HeadroomError):
    """The directory of the store cannot be used."""


class NotASGIError(HeadroomError, TypeError):
    """What was given to ``init`` is no ASGI application."""


class MissingExtraError(HeadroomError, ImportError):
    """An optional library is needed; the message names the extra that installs it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: run `pip install 'fastapi-headroom[{extra}]'`."
        )
        self.library, self.extra = library, extra


class PortInUseError(HeadroomError):
    """The exporter's port is taken."""
