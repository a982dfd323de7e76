"""Where the series of a mapping begin, found by their first key.

A worker has many keys, and with their help texts they would be most of what it keeps in memory. They lie in the mapping
anyhow, and all keys of one series one after the other. So only a hash of each series' first key is remembered, and
where its entry begins; the mapping tells whether it is that key, and what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from mmap import mmap

from fastapi_headroom.store import layout


class Keys:
    """Callers hold the writer's lock."""

    __slots__ = ("_clashes", "_starts")

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        """Offset of a series' first entry, by the hash of its key."""
        self._clashes: dict[bytes, int] = {}
        """The same of keys that share their hash with one that came before them."""

    def add(self, mapping: mmap, raw: bytes, offset: int) -> None:
        """Take note of a series whose first entry was written at an offset; of two of one key the later one counts."""
        before = self._starts.setdefault(hash(raw), offset)
        if before != offset:
            if _is_at(mapping, before, raw):
                self._starts[hash(raw)] = offset
            else:
                self._clashes[raw] = offset

    def start(self, mapping: mmap, raw: bytes) -> int | None:
        """Return the offset of a series' first entry, or None when there is no such series."""
        offset = self._starts.get(hash(raw))
        if offset is None or _is_at(mapping, offset, raw):
            return offset
        return self._clashes.get(raw)


def follow(mapping: mmap, offset: int, keys: Iterable[bytes]) -> list[int]:
    """Return the indexes of the values of keys whose entries lie one after the other from an offset on.

    Ends before the first that does not lie there.
    """
    indexes = []
    for raw in keys:
        if not _is_at(mapping, offset, raw):
            break
        indexes.append(layout.value_index(offset, raw))
        offset = indexes[-1] * 8 + 16
    return indexes


def laid_out(offset: int, keys: Sequence[bytes]) -> list[int]:
    """Return the indexes that the values of keys have whose entries are written one after the other at an offset."""
    indexes = []
    for raw in keys:
        indexes.append(layout.value_index(offset, raw))
        offset = indexes[-1] * 8 + 16
    return indexes


def _is_at(mapping: mmap, offset: int, raw: bytes) -> bool:
    head = layout.head(raw)
    return mapping[offset : offset + len(head)] == head
