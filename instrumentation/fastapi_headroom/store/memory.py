"""What the writers of this process hold in memory for want of a file, so that a reader here can show it.

A worker that degraded writes where no other process can look. When it is the one that exports, its reader
finds those series here. While somebody reads nothing moves from memory to files: a count is seen once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastapi_headroom.store.region import Region


@dataclass(frozen=True, slots=True)
class Held:
    """One region in memory: the start of the name that its file would have, and the slot, if there is one."""

    stem: str
    slot: int | None
    region: Region


class Holder(Protocol):
    """Who may hold series in memory."""

    directory: Path | None

    def held(self) -> list[Held]:
        """Return what is in memory now."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_moving = threading.Lock()


def register(holder: Holder) -> None:
    """Let readers of this process ask the holder."""
    _holders.add(holder)


@contextmanager
def moving() -> Iterator[None]:
    """Keep readers of this process away while series change their place."""
    with _moving:
        yield


@contextmanager
def standing(directory: Path) -> Iterator[list[Held]]:
    """Yield what this process holds in memory for a directory; it stays where it is meanwhile."""
    with _moving:
        yield [held for holder in list(_holders) if holder.directory == directory for held in holder.held()]


def renew_lock() -> None:
    """Replace the lock in a forked child: another thread of the parent may have held it at the fork."""
    global _moving
    _moving = threading.Lock()
