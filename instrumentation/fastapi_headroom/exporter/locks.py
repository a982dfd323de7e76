"""Lock files that say who exports a store: ``exporter.lock`` for an elected worker, ``sidecar.lock`` for a sidecar.

Open-file-description locks: they die with their process, also across containers that share a volume, and
can be asked about without being taken.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fastapi_headroom.store import slot

EXPORTER_LOCK = "exporter.lock"
SIDECAR_LOCK = "sidecar.lock"

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name must hold nobody up


class FileLock:
    """A lock file that is held until :meth:`release`, or the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def acquire(cls, path: Path, *, mode: int = 0o600) -> FileLock | None:
        """Take the lock, creating its file; return None when somebody else has it. Raises OSError.

        Another user's store that may only be read gives a shared lock, which is as visible to its owner.
        """
        try:
            descriptor, shared = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, mode), False
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            try:
                descriptor, shared = os.open(path, os.O_RDONLY | _FLAGS), True
            except FileNotFoundError:
                raise error from None
        lock = cls(path, descriptor)
        try:
            _widen(descriptor, mode)
            # a lock on a file that somebody deleted in between guards nothing
            if _take(descriptor, shared=shared) and lock.is_current():
                return lock
        except OSError:
            lock.release()
            raise
        lock.release()
        return None

    def is_current(self) -> bool:
        """Return whether the path still leads to the file that is locked, and not to nothing or to a newer file."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def release(self) -> None:
        """Let go. In a forked child this closes the copy of the descriptor and leaves the parent its lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def provide(path: Path, *, mode: int) -> None:
    """Create a lock file for others, who may not be allowed to. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, mode)
    try:
        _widen(descriptor, mode)
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Return whether anybody holds the lock, without taking it; False when there is no such file to ask."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    try:
        return slot.is_held(descriptor)
    finally:
        os.close(descriptor)


def slots_alive(directory: Path) -> list[int]:
    """Return the numbers of the slots whose worker lives, ascending; none when the directory is not there."""
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return []
    slots = (match for name in names if (match := slot.LOCK_FILE.fullmatch(name)))
    return sorted(int(match[1]) for match in slots if is_held(directory / match[0]))


def _take(descriptor: int, *, shared: bool) -> bool:
    """Lock an open file and return True, or False when somebody else has it. Raises OSError."""
    try:
        slot.take(descriptor, shared=shared)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _widen(descriptor: int, mode: int) -> None:
    """Give our own file its mode, of which the umask may have taken the group's right."""
    if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, mode)
