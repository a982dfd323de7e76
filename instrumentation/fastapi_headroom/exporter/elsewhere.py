"""Say where apps of this user write, when it is not where a sidecar looks.

App and sidecar find one store by one service name, and without a name by the working directory's, so that two
terminals are enough for two stores.
"""

from __future__ import annotations

from pathlib import Path

from fastapi_headroom import settings
from fastapi_headroom.exporter.locks import EXPORTER_LOCK, is_held, slots_alive

_MOST_NAMED = 3


def exporting(directory: Path) -> str:
    """Return what to add to a message about a port in use: which other stores' workers export; "" when none does."""
    stores = [store for store in _others(directory) if is_held(store / EXPORTER_LOCK)]
    if not stores:
        return ""
    return f". Workers of {_named(stores)} export by themselves: if that is the app that is meant, {_remedy(stores)}"


def writing(directory: Path) -> str:
    """Return what to do about a store that no worker writes to: which other ones have workers, if any."""
    stores = [store for store in _others(directory) if slots_alive(store)]
    if not stores:
        return "start the app, with the same HEADROOM_SERVICE_NAME or HEADROOM_DIRECTORY"
    return f"there are workers in {_named(stores)}: if that is the app that is meant, {_remedy(stores)}"


def _others(directory: Path) -> list[Path]:
    """Return other stores, the one that changed last first."""
    return [store for store in settings.default_stores() if store != directory]


def _named(stores: list[Path]) -> str:
    more = f" and {len(stores) - _MOST_NAMED} others" if len(stores) > _MOST_NAMED else ""
    return ", ".join(map(str, stores[:_MOST_NAMED])) + more


def _remedy(stores: list[Path]) -> str:
    return f"start both with one HEADROOM_SERVICE_NAME (--service), or the sidecar with --dir {stores[0]}"
