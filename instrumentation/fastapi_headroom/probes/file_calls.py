"""Tells from the system call that a thread sleeps in whether it waits for a file.

``open`` and the methods of files are C code without a place to wrap. The kernel knows all the same where a thread
sleeps, and asking costs nothing as long as nobody asks: the watchdog does when the loop is late already.
"""

from __future__ import annotations

import os
import platform
from typing import Final

from fastapi_headroom.thresholds import BLOCKING_CALL_SECONDS

# Of <asm/unistd.h>. The first argument of these is a descriptor:
# read write fstat lseek pread64 pwrite64 readv writev fcntl flock fsync fdatasync ftruncate getdents64 fallocate
# preadv pwritev syncfs copy_file_range preadv2 pwritev2
_ON_DESCRIPTOR: Final = {
    "x86_64": "0 1 5 8 17 18 19 20 72 73 74 75 77 217 285 295 296 306 326 327 328",
    "aarch64": "63 64 80 62 67 68 65 66 25 32 82 83 46 61 47 69 70 267 285 286 287",
}
# These take paths: open openat openat2 stat lstat newfstatat statx access truncate rename renameat renameat2 mkdir
# mkdirat rmdir link linkat unlink unlinkat symlink symlinkat readlink readlinkat; and sync
_ON_PATH: Final = {
    "x86_64": "2 257 437 4 6 262 332 21 76 82 264 316 83 258 84 86 265 87 263 88 266 89 267 162",
    "aarch64": "56 437 79 291 45 38 276 34 37 35 36 78 81",
}
_MACHINE: Final = platform.machine()
_DESCRIPTOR_CALLS: Final = frozenset(_ON_DESCRIPTOR.get(_MACHINE, "").split())
_PATH_CALLS: Final = frozenset(_ON_PATH.get(_MACHINE, "").split())
_NO_FILES: Final = ("socket:", "anon_inode:")
SUPPORTED: Final = bool(_PATH_CALLS)
"""Whether the numbers of this machine's system calls are known."""


def is_file_call(system_call: str | None) -> bool:
    """Return whether a thread of this process sleeps in a call on a file, a named or unnamed pipe, or a terminal.

    ``system_call`` is what ``ThreadStat.system_call`` returned a moment ago.
    """
    if system_call is None:
        return False
    number, _, arguments = system_call.partition(" ")
    if number in _PATH_CALLS:
        return True
    if number not in _DESCRIPTOR_CALLS:
        return False
    try:
        descriptor = int(arguments.split(" ", 1)[0], 16)
        return not os.readlink(f"/proc/self/fd/{descriptor}").startswith(_NO_FILES)  # noqa: PTH115
    except (OSError, ValueError):
        return False  # closed meanwhile


class FileCalls:
    """Follows the looks at one step of the loop, and finds calls on files that last."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._found = False

    def lasts(self, system_call: str | None, same_step: bool, now: float) -> bool:
        """Return True once for each call, or run of calls, in which looks found a step for BLOCKING_CALL_SECONDS."""
        if not is_file_call(system_call):
            self._since = None
            return False
        if self._since is None or not same_step:
            self._since, self._found = now, False
        if self._found or now - self._since < BLOCKING_CALL_SECONDS:
            return False
        self._found = True
        return True
