"""Where the series lie that every ordinary request writes to: looked up once, and again after they were moved.

Six histograms share the view of one file, so their flags (see ``store.marks``) are few and their cells are plain
numbers: a request is one dictionary look-up and a row of additions, without asking each handle where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from fastapi_headroom.store.writer import Counter, Histogram

MAX_MARKS: Final = 4
"""Blocks that are flagged at most: the series of the route are made in one go, those of the method and status apart."""
Cells = tuple[int, ...]
"""Indexes of a histogram's buckets, and last that of its sum."""


class Place(NamedTuple):
    """Indexes into the views of two files."""

    moves: int
    """``MOVES.count`` when this was looked up: another number there makes it void."""
    histograms: tuple[memoryview[float], int, int, int, int, Cells, Cells, Cells, Cells, Cells, Cells]
    """The view, the flags that are to be set (0: none; the third implies the fourth), and the cells."""
    counters: tuple[memoryview[float], int, int]


def find_place(moves: int, histograms: Sequence[Histogram], requests: Counter, on_loop: Counter) -> Place | None:
    """Return the place of six histograms and two counters, or None while they do not lie together.

    ``moves`` is what the number was before: handles may be sent elsewhere meanwhile.
    """
    marks: dict[int, None] = {}
    cells: list[Cells] = []
    views = set()
    for histogram in histograms:
        # In one uninterrupted step, as they are sent.
        view, index, buckets, mark = histogram.view, histogram.index, histogram.cells, histogram.mark
        views.add(id(view))
        marks[mark] = None
        cells.append((*buckets, index))
    counters, requests_index = requests.view, requests.index
    same, on_loop_index = on_loop.view, on_loop.index
    if len(views) > 1 or counters is not same or len(marks) > MAX_MARKS:
        return None
    flags = [*marks, 0, 0, 0][:MAX_MARKS]
    if flags[2] and not flags[3]:
        flags[3] = flags[2]
    by_duration, by_latency, by_first_byte, by_hold, by_queries, by_size = cells
    return Place(
        moves,
        (view, *flags, by_duration, by_latency, by_first_byte, by_hold, by_queries, by_size),  # type: ignore[arg-type]
        (counters, requests_index, on_loop_index),
    )
