"""Where the series lie that every ordinary request writes to: looked up once, and again after they were moved.

Six histograms share the view of one file, so their flags (see ``store.marks``) are few and their cells are plain
numbers: a request is one dictionary look-up and a row of additions, without asking each handle where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi_headroom.store.writer import Counter, Histogram

MAX_MARKS: Final = 4
"""Blocks that are flagged at most: the series of the route are made in one go, those of the method and status apart."""


class Place:
    """Indexes into the views of two files."""

    __slots__ = ("moves", "where")

    def __init__(self, moves: int, where: tuple[Any, ...]) -> None:
        self.moves = moves
        """``MOVES.count`` when this was looked up: another number there makes it void."""
        self.where = where
        """In one tuple, to be taken apart in one go: the view of the histograms; the MAX_MARKS flags that are to be
        set (0: none; the third implies the fourth); of each histogram the cells of its buckets and that of its sum;
        the view of the counters, and their two cells."""


def find_place(moves: int, histograms: Sequence[Histogram], requests: Counter, on_loop: Counter) -> Place | None:
    """Return the place of six histograms and two counters, or None while they do not lie together.

    ``moves`` is what the number was before: handles may be sent elsewhere meanwhile.
    """
    marks: dict[int, None] = {}
    cells: list[tuple[int, ...] | int] = []
    views = set()
    for histogram in histograms:
        # In one uninterrupted step, as they are sent.
        view, index, buckets, mark = histogram.view, histogram.index, histogram.cells, histogram.mark
        views.add(id(view))
        marks[mark] = None
        cells += buckets, index
    counters, requests_index = requests.view, requests.index
    same, on_loop_index = on_loop.view, on_loop.index
    if len(views) > 1 or counters is not same or len(marks) > MAX_MARKS:
        return None
    flags = [*marks, 0, 0, 0][:MAX_MARKS]
    if flags[2] and not flags[3]:
        flags[3] = flags[2]
    return Place(moves, (view, *flags, *cells, counters, requests_index, on_loop_index))
