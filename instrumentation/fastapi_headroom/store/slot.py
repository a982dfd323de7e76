"""Worker slots: which worker writes which files, kept by open-file-description locks.

A worker holds the lock of the lowest free ``slotN.lock`` as long as it lives; the operating system lets go
of it however the worker ends, also across containers that share the directory. Readers ask who holds a
lock without taking it, so a scrape never makes a restarting worker skip a slot.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
import sys
from dataclasses import dataclass
from json import dumps, loads  # by name, see layout
from pathlib import Path
from typing import Any

from fastapi_headroom.errors import StoreError

SLOTS = 4096
"""Workers that one directory can hold."""
LOCK_FILE = re.compile(r"slot(\d+)\.lock")

_HAS_OFD_LOCKS = hasattr(fcntl, "F_OFD_SETLK") or sys.platform.startswith("linux")
# Linux's numbers, for Pythons built against headers that lack them.
_OFD_GETLK: int = getattr(fcntl, "F_OFD_GETLK", 36)
_OFD_SETLK: int = getattr(fcntl, "F_OFD_SETLK", 37)
# struct flock: type, whence, start, length, pid (0, as open-file-description locks demand), padding.
_flock = struct.Struct("hhqqi4x")
_RECORD_SIZE = 128
_WHOLE_FILE_EXCLUSIVE = _flock.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_WHOLE_FILE_SHARED = _flock.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)


class SlotTakenError(StoreError):
    """The slot that a worker had, and lost with its lock file, has another owner."""


def prepare_directory(directory: Path, *, group_readable: bool) -> None:
    """Make the directory of the store, readable by its owner, or by the group too.

    A directory that was there keeps its mode, save that 0700 is widened for the group when that is asked for.
    Raises StoreError when it cannot be used.
    """
    wanted = 0o750 if group_readable else 0o700
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=wanted)
            # The umask may have narrowed it. A group that is inherited must go on to the files.
            directory.chmod(wanted | directory.stat().st_mode & stat.S_ISGID)
        except FileExistsError:
            pass
        status = directory.stat()
    except OSError as error:
        raise StoreError(f"the store's directory {directory} cannot be made: {error.strerror}; {REMEDY}") from error
    mode, user = stat.S_IMODE(status.st_mode), os.geteuid()
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"the store's directory {directory} is a file; {REMEDY}")
    if status.st_uid not in (user, 0) and mode & stat.S_IWOTH:
        raise StoreError(
            f"the store's directory {directory} belongs to user id {status.st_uid} and everybody may write to it; "
            f"{REMEDY}"
        )
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(
            f"the store's directory {directory} (user id {status.st_uid}, mode {mode:04o}) cannot be written "
            f"by user id {user}; {REMEDY}"
        )
    if group_readable and mode & 0o777 == 0o700 and status.st_uid == user:
        directory.chmod(wanted | mode & stat.S_ISGID)


REMEDY = "set HEADROOM_DIRECTORY to a directory that this user owns, or let this user write to it"


@dataclass(slots=True)
class Slot:
    """A claimed slot. ``fd`` holds the lock; ``owned_before`` says whether another worker had it."""

    number: int
    fd: int
    fingerprint: str
    owned_before: bool

    path: Path

    @classmethod
    def claim(cls, directory: Path, *, mode: int = 0o600, number: int | None = None) -> Slot:
        """Take the lowest free slot, or none but ``number``.

        Raises StoreError when there is none or the directory cannot be used.
        """
        wanted = range(SLOTS) if number is None else (number,)
        for number in wanted:
            path = directory / f"slot{number}.lock"
            try:
                fd = _lock(path, mode)
            except OSError as error:
                raise StoreError(
                    f"the store's directory {directory} cannot hold locks: {error.strerror}; {REMEDY}"
                ) from error
            if fd is not None:
                record = _read_record(fd)
                return cls(number, fd, str(record.get("fingerprint", "")), bool(record), path)
        if len(wanted) == 1:
            raise SlotTakenError(f"slot {wanted[0]} of {directory} has another owner by now; restart this worker")
        raise StoreError(f"all {SLOTS} slots of {directory} are taken; give each service a directory of its own")

    def record(self, fingerprint: str) -> None:
        """Note in the lock file whose files these are now. Raises OSError when the disk is full."""
        text = dumps({"fingerprint": fingerprint, "pid": os.getpid()})
        # Always the same length, so that a restart on a full disk overwrites what is there and needs no space.
        os.pwrite(self.fd, text.ljust(_RECORD_SIZE).encode(), 0)
        self.fingerprint = fingerprint

    def is_current(self) -> bool:
        """Return whether the lock file is still there under its name: a lock on a deleted file guards nothing."""
        return has_name(self.fd, self.path)

    def release(self) -> None:
        """Let go of the lock by closing its descriptor. In a forked child only the child's copy goes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def fingerprint_in(path: Path) -> str:
    """Return whose files a lock file says that its slot has, without locking it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return str(_read_record(fd).get("fingerprint", ""))
    finally:
        os.close(fd)


def has_name(fd: int, path: Path) -> bool:
    """Return whether a path leads to an open file; True as well when that cannot be told, for want of rights."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def is_held(fd: int) -> bool:
    """Return whether somebody holds the lock of an open lock file, without taking it."""
    if not _HAS_OFD_LOCKS:
        return _flock_is_held(fd)
    kind: int = _flock.unpack(fcntl.fcntl(fd, _OFD_GETLK, _WHOLE_FILE_EXCLUSIVE))[0]
    return kind != fcntl.F_UNLCK


def _lock(path: Path, mode: int) -> int | None:
    """Return a descriptor that holds the lock of a file, or None when somebody else does."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        except PermissionError:
            if path.exists():
                return None  # another user's slot
            raise
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                return None  # no file of ours: the slot is not to be had
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        try:
            take(fd)
            if os.fstat(fd).st_ino == path.stat().st_ino:
                if os.fstat(fd).st_uid == os.geteuid():
                    os.fchmod(fd, mode)
                return fd
        except FileNotFoundError:
            pass  # somebody emptied the directory in between: a lock on a file without a name guards nothing
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        os.close(fd)


def take(fd: int, *, shared: bool = False) -> None:
    """Lock an open file. Raises OSError, with EAGAIN or EACCES when somebody else has it."""
    if _HAS_OFD_LOCKS:
        fcntl.fcntl(fd, _OFD_SETLK, _WHOLE_FILE_SHARED if shared else _WHOLE_FILE_EXCLUSIVE)
    else:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def take_byte(fd: int, at: int) -> None:
    """Lock one byte of an open file. Raises OSError: EAGAIN or EACCES when somebody else has it, ENOSYS where there
    are no open-file-description locks."""
    if not _HAS_OFD_LOCKS:
        raise OSError(errno.ENOSYS, "this system has no open-file-description locks")
    fcntl.fcntl(fd, _OFD_SETLK, _flock.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))


def give_byte(fd: int, at: int) -> None:
    """Let go of one byte's lock."""
    fcntl.fcntl(fd, _OFD_SETLK, _flock.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def byte_is_held(fd: int, at: int) -> bool:
    """Return whether somebody else holds one byte's lock, without taking it."""
    kind: int = _flock.unpack(fcntl.fcntl(fd, _OFD_GETLK, _flock.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)))[0]
    return kind != fcntl.F_UNLCK


def _flock_is_held(fd: int) -> bool:
    """Ask by a shared flock, let go of at once: all that systems without open-file-description locks offer.

    A worker that claims in that very moment skips the slot.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _read_record(fd: int) -> dict[str, Any]:
    text = os.pread(fd, 4096, 0)
    if not text:
        return {}
    try:
        record = loads(text)
    except ValueError:
        record = None
    # A record that cannot be read still says that somebody was here.
    return record if isinstance(record, dict) and record else {"fingerprint": ""}
