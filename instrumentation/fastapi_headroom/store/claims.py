"""How many connections each worker may open: a small file in the store's directory, the same for all workers.

Each claims a place of its own, by a lock on one byte that the operating system lets go of however the worker ends, and
writes there what it may open. Whoever changes its claim holds the file's own lock meanwhile and has looked at all
other claims, so their sum never exceeds the budget. A claim is raised before connections are opened and lowered after
they were closed. What a dead worker claimed counts for LINGER seconds more, while the server notices; one that is
started in its place gets its minimum of it at once.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from fastapi_headroom.errors import StoreError
from fastapi_headroom.store.slot import byte_is_held, give_byte, has_name, take_byte

PLACES: Final = 1024
"""Pools of workers that can share one budget."""
LINGER: Final = 2.0
"""Seconds after a worker's death in which its connections may still be open on the server."""
_TRIES, _PAUSE = 40, 0.005
_MUTEX: Final = 1 << 20
"""The byte whose lock is held while claims change; the places' locks follow it. All lie behind the content."""
_MAGIC: Final = b"headroom claims 1".ljust(64)
_record = struct.Struct("qqqqdq16x")
_SIZE: Final = _record.size


class BusyError(StoreError):
    """Another worker has had the file for longer than it needs."""


class Claim(NamedTuple):
    """What one worker wrote of its pool. Numbers are connections."""

    claimed: int = 0
    """It may open so many."""
    wanted: int = 0
    """It would like so many, no less than ``floor``."""
    floor: int = 0
    """It should get so many before anybody gets more than that."""
    lingering: int = 0
    """Its dead predecessor may have so many open."""
    until: float = 0.0
    """Until when (``time.monotonic``); 0 while nobody has noticed its death."""


class Claims:
    """One worker's view of the file. Not for concurrent use, but for the lock's sake safe."""

    def __init__(self, path: Path, *, mode: int = 0o600) -> None:
        self._path, self._mode = path, mode
        self._fd = -1
        self._place = -1
        self._lock = threading.Lock()
        self.lost_at = float("-inf")
        """When the file was last found deleted (``time.monotonic``): the others write to the new one soon."""

    def open(self) -> None:
        """Open the file and claim a place: a dead worker's if there is one. Raises OSError and StoreError."""
        with self._lock, self._mine_alone():
            pass

    def close(self) -> None:
        """Give the claim back. Idempotent."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                if self._place >= 0:
                    os.pwrite(self._fd, _record.pack(0, 0, 0, 0, 0.0, 0), self._offset(self._place))
            except OSError:
                pass  # it counts as a dead worker's then
            self.abandon()

    def abandon(self) -> None:
        """Close the descriptor and write nothing: in a forked child it is the parent's place."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._place = -1

    def forget_lock(self) -> None:
        """Make the lock anew: in a forked child another thread of the parent may have held it."""
        self._lock = threading.Lock()

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Look at all claims and change one's own. Raises BusyError, OSError and StoreError."""
        with self._lock, self._mine_alone() as claims:
            mine = claims.pop(self._place, Claim())
            before = sum(place < self._place for place in claims)
            yield Change(self._fd, self._offset(self._place), mine, list(claims.values()), before)

    @contextmanager
    def _mine_alone(self) -> Iterator[dict[int, Claim]]:
        if self._fd < 0 or not has_name(self._fd, self._path):
            if self._fd >= 0:
                self.lost_at = time.monotonic()
            self.abandon()
            self._fd = self._open()
        fd = self._fd
        for left in reversed(range(_TRIES)):
            try:
                take_byte(fd, _MUTEX)
                break
            except OSError:
                if not left:
                    raise BusyError(f"{self._path} has been locked by another worker for {_TRIES * _PAUSE} s") from None
                time.sleep(_PAUSE)
        try:
            claims = self._read()
            if self._place < 0:
                self._take_place(claims)
            yield claims
        finally:
            give_byte(fd, _MUTEX)

    def _open(self) -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, self._mode)
        try:
            if os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                os.pwrite(fd, _MAGIC, 0)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _read(self) -> dict[int, Claim]:
        """Return the claims by place, those of the dead as what lingers of them."""
        content = os.pread(self._fd, PLACES * _SIZE, _SIZE)
        now = time.monotonic()
        claims = {}
        for place in range(len(content) // _SIZE):
            claimed, wanted, floor, lingering, until, _ = _record.unpack_from(content, place * _SIZE)
            claim = Claim(claimed, wanted, floor, lingering, until)
            if lingering and until and not now <= until <= now + LINGER:  # also after a restart of the machine
                claim = claim._replace(lingering=0, until=0.0)
            if place != self._place and claim != Claim() and not byte_is_held(self._fd, _MUTEX + 1 + place):
                claim = self._bury(place, claim, now)
            if claim != Claim():
                claims[place] = claim
        return claims

    def _bury(self, place: int, claim: Claim, now: float) -> Claim:
        if claim.claimed or claim.wanted:
            claim = Claim(lingering=claim.claimed + claim.lingering, until=now + LINGER)
        if not claim.lingering:
            claim = Claim()
        os.pwrite(self._fd, _record.pack(*claim, 0), self._offset(place))
        return claim

    def _take_place(self, claims: dict[int, Claim]) -> None:
        dead = [place for place, claim in claims.items() if claim.lingering and not claim.wanted]
        for place in (*dead, *(place for place in range(PLACES) if place not in claims)):
            try:
                take_byte(self._fd, _MUTEX + 1 + place)
            except OSError:
                continue
            self._place = place
            return
        raise StoreError(f"all {PLACES} places of {self._path} are taken; give each service a directory of its own")

    def _offset(self, place: int) -> int:
        return _SIZE * (1 + place)


class Change:
    """The claims as they are while nobody else may change them."""

    def __init__(self, fd: int, offset: int, mine: Claim, others: list[Claim], before: int) -> None:
        self._fd, self._offset = fd, offset
        self.mine = mine
        self.others = others
        """What the others claim, in the order of their places."""
        self.before = before
        """How many of them have a place before mine."""

    @property
    def taken(self) -> int:
        """Connections that all others may have open."""
        return sum(other.claimed + other.lingering for other in self.others)

    def write(self, claimed: int, wanted: int, floor: int, budget: int) -> Claim:
        """Claim as many as there are, but no more than that; what is claimed already stays. Returns what is now mine.

        Of what a dead predecessor left, ``floor`` can be had at once, the rest when it has lingered.
        """
        mine = self.mine
        room = max(0, budget - self.taken)
        allowed = max(room - mine.lingering, min(floor, room))
        claimed = claimed if claimed <= mine.claimed else max(mine.claimed, min(claimed, allowed))
        lingering = min(mine.lingering, max(0, room - claimed))
        self.mine = Claim(claimed, wanted, floor, lingering, mine.until if lingering else 0.0)
        os.pwrite(self._fd, _record.pack(*self.mine, os.getpid()), self._offset)
        return self.mine
