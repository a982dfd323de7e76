"""The apps that ``init`` was called for, and their handles.

An app belongs to its user. One that is dropped without ``shutdown()``, as a test suite does with thousands, is
forgotten. A handle that its user keeps keeps its app, which may be served through it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Handle = TypeVar("Handle")


class Apps(Generic[Handle]):
    """Handles by app. All that is done for one app takes the same time however many there are."""

    def __init__(self) -> None:
        self._apps: dict[int, Callable[[], Any]] = {}
        self._handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()

    def add(self, app: Any, handle: Handle, *, weakly: bool) -> None:
        """Keep an app's handle: as long as the app lives (``weakly``), else until ``discard``."""
        key, apps = id(app), self._apps
        self._handles[key] = handle
        if weakly:
            apps[key] = weakref.ref(app, lambda _: apps.pop(key, None))
        else:
            kept = (app, handle)
            apps[key] = lambda: kept[0]

    def __contains__(self, app: Any) -> bool:
        return id(app) in self._apps

    def __len__(self) -> int:
        return len(self._apps)

    def handle_of(self, app: Any) -> Handle | None:
        """Return an app's handle, None when nobody has it any more."""
        return self._handles.get(id(app)) if app in self else None

    def discard(self, app: Any) -> None:
        """Forget an app."""
        self._apps.pop(id(app), None)

    def living(self) -> list[Any]:
        """Return the apps that are there. A job worker without an app has none."""
        found = [app() for app in list(self._apps.values())]
        return [app for app in found if app is not None]
