"""Reads what the kernel knows about this process: memory, descriptors, threads, sockets, control groups.

Every function returns ``None`` (or nothing) where the kernel does not tell, so that a caller can leave the series
out. On systems without ``/proc`` that is most of them.
"""

from __future__ import annotations

import os
import platform
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
NO_LIMIT = 1 << 60
"""Bytes from which on a limit is none: control groups of version 1 write 2**63 less a page."""
_FUTEX = {"x86_64": "202", "aarch64": "98", "riscv64": "98", "ppc64le": "221", "s390x": "238"}
FUTEX = _FUTEX.get(platform.machine())
"""Number of the system call in which a thread waits for a lock, and so for the GIL; None where unknown."""
_EPOLL = {"x86_64": {"232", "281", "441"}, "aarch64": {"22", "441"}, "riscv64": {"22", "441"}}
EPOLL_WAITS: frozenset[str] = frozenset(_EPOLL.get(platform.machine(), ()))
"""Numbers of the system calls in which a thread waits for any of many files: epoll_wait and its kin."""
_UNACKED, _UNACKED_OFFSET = struct.Struct("=I"), 24
"""Where ``struct tcp_info`` has ``tcpi_unacked``: for a listening socket, the length of its accept queue."""


class Times(NamedTuple):
    """What the kernel's scheduler counted of one thread, since it began."""

    on_cpu: float
    """Seconds on a CPU."""
    waiting: float
    """Seconds ready, but without a CPU."""
    turns: int
    """Times that it was given a CPU. A thread that sleeps in a call has none; one that waits for the GIL wakes
    every ``sys.getswitchinterval()`` to ask for it."""


class ThreadStat:
    """What the kernel knows about one thread of this process. Owns file descriptors while open."""

    __slots__ = ("_descriptor", "_syscall")

    def __init__(self, native_id: int, proc: Path = PROC) -> None:
        folder = proc / "self" / "task" / str(native_id)
        self._descriptor = _open(folder / "schedstat")  # none without Linux, or without CONFIG_SCHED_INFO
        self._syscall = _open(folder / "syscall")

    def times(self) -> Times | None:
        """Return what the scheduler counted, None where it does not tell."""
        if self._descriptor is None:
            return None
        try:
            on_cpu, waiting, turns = os.pread(self._descriptor, 96, 0).split()[:3]
        except (OSError, ValueError):
            return None
        return Times(int(on_cpu) * 1e-9, int(waiting) * 1e-9, int(turns))

    def system_call(self) -> str | None:
        """Return the system call that the thread sleeps in: number, arguments, stack and instruction pointer.

        ``running`` when it is in none, or ready to go on; None where the system does not tell. Two equal answers are
        of one and the same call when the thread had no turn in between.
        """
        call = self.raw_system_call()
        return (call.decode().strip() or None) if call else None

    def raw_system_call(self) -> bytes | None:
        """Return the same as the kernel writes it."""
        if self._syscall is None:
            return None
        try:
            # In one call: it gives the GIL away, and whoever waits for that would be gone before the next one.
            return os.pread(self._syscall, 256, 0)
        except OSError:
            return None

    def close(self) -> None:
        """Release the descriptors. Idempotent."""
        descriptors = (self._descriptor, self._syscall)
        self._descriptor = self._syscall = None
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)


def thread_cpu(native_id: int) -> float | None:
    """Return the CPU seconds of a thread of this process; None when it has ended, or where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        # The clock of a thread, made as the C library makes it, but from an id that may be one of the past.
        return time.clock_gettime((~native_id << 3) | 6)
    except OSError:
        return None


def resident_memory(proc: Path = PROC) -> int | None:
    """Return the resident memory of this process, in bytes."""
    text = _read(proc / "self" / "statm")
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else None


def open_descriptors(proc: Path = PROC) -> int | None:
    """Return how many file descriptors this process has open."""
    folder = str(proc / "self" / "fd")
    try:
        # Since Linux 6.2 the size of the folder is the number; before, it is 0.
        return os.stat(folder).st_size or len(os.listdir(folder)) - 1  # noqa: PTH208, PTH116 (each second: kept cheap)
    except OSError:
        return None


def start_time(proc: Path = PROC) -> float | None:
    """Return when this process started, in seconds since 1970."""
    stat, system = _read(proc / "self" / "stat"), _read(proc / "stat")
    for line in (system or "").splitlines():
        if stat and line.startswith("btime "):
            ticks = int(stat.rpartition(")")[2].split()[19])  # the command in brackets may hold spaces
            return float(line.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return None


def memory_limit(proc: Path = PROC) -> int | None:
    """Return the memory that this process may use, in bytes.

    That is the least of its control group's limit and those of the groups above (version 1 and 2), and of the
    machine's memory.
    """
    limits = list(_group_limits(proc))
    for line in (_read(proc / "meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return min([*limits, int(line.split()[1]) * 1024])
    return min(limits, default=None)


def _group_limits(proc: Path) -> Iterator[int]:
    mounts = [line.split() for line in (_read(proc / "self" / "mounts") or "").splitlines()]
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            kind, name = "cgroup2", "memory.max"
        elif "memory" in controllers.split(","):
            kind, name = "cgroup", "memory.limit_in_bytes"
        else:
            continue
        for mount in mounts:
            if mount[2] != kind or (kind == "cgroup" and "memory" not in mount[3].split(",")):
                continue
            top = Path(mount[1])
            folder = top / group.lstrip("/")
            # In a container the path may be the host's, and the mount already the group: walk up to the mount.
            for place in (folder, *folder.parents):
                text = (_read(place / name) or "").strip()
                if text.isdigit() and int(text) < NO_LIMIT:
                    yield int(text)
                if place == top:
                    break


def socket_descriptors(most: int, proc: Path = PROC) -> list[int]:
    """Return the descriptors of this process that are sockets; none when more than ``most`` are open."""
    folder = str(proc / "self" / "fd")
    found: list[int] = []
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except OSError:
        return found
    for name in names if len(names) <= most else ():
        try:
            if os.readlink(f"{folder}/{name}").startswith("socket:"):  # noqa: PTH115
                found.append(int(name))
        except OSError:
            continue  # closed meanwhile
    return found


def accept_backlog(descriptor: int) -> tuple[int, int] | None:
    """Return port and number of connections that wait to be accepted; None unless it is a listening TCP socket.

    Asks the socket itself: reading ``/proc/net/tcp`` costs a walk over the kernel's whole table.
    """
    try:
        # On a duplicate that lives for microseconds: a kept one would hold the port open after the server closed it.
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
                return None
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return None
            information = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
            return listener.getsockname()[1], _UNACKED.unpack_from(information, _UNACKED_OFFSET)[0]
    except (OSError, AttributeError, struct.error):
        return None  # closed meanwhile, or no Linux


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
