"""Moving series from one region to another while threads write to them, without losing a count.

A handle's write is one uninterrupted step (see ``handles``), and so is each assignment here. Counts: the handle is
sent to its new place first, then the old value, which nobody changes any more, is added there. Gauges: value and
handle move in one step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from fastapi_headroom.store import layout
from fastapi_headroom.store.handles import MOVES, Gauge, Handle, Histogram, counting_lock
from fastapi_headroom.store.region import Region


def move(source: Region, target: Region, *, same_file: bool = False) -> None:
    """Give all series of one region to another, with their values; counts that are there already are added to.

    ``same_file`` says that both map one file: then nothing but the handles moves. Raises FullError or OSError
    when the target has no room: what has moved until then stays moved, the rest stays.
    """
    keys = {index: raw for raw, index in source.positions()}
    moved: set[int] = set()
    groups: defaultdict[int, list[Handle]] = defaultdict(list)
    for handle in source.handles:
        groups[handle.index].append(handle)
    try:
        for index, handles in groups.items():
            first = handles[0]
            indexes = (index, *first.cells) if isinstance(first, Histogram) else (index,)
            places = target.place([keys[i] for i in indexes])
            target.handles += handles
            target.marks.flag_all()  # before each step: settling may come in between
            mark = target.marks.index(places)
            with counting_lock():
                _send(handles, target.view, places, mark)
            MOVES.count += 1
            if not same_file and not isinstance(first, Gauge):
                _add(source.view, indexes, target.view, places)
            moved.update(indexes)
        left = [(raw, index) for index, raw in keys.items() if index not in moved]
        for series in layout.by_series(left):  # of an earlier owner; nobody writes to them now
            indexes = tuple(index for _, index in series)
            places = target.place([raw for raw, _ in series])
            if not same_file:
                target.marks.flag_all()
                _add(source.view, indexes, target.view, places)
            moved.update(indexes)
    finally:
        source.forget(moved)
        source.handles = [handle for handle in source.handles if handle.view is source.view]


def _send(handles: Sequence[Handle], view: memoryview[float], places: Sequence[int], mark: int) -> None:
    place, cells = places[0], tuple(places[1:])
    for handle in handles:
        # No call and no loop between the assignments of one handle: no other thread runs in between.
        if isinstance(handle, Gauge):
            view[place] = handle.view[handle.index]
            view[place + 1] = handle.view[handle.index + 1]
        elif isinstance(handle, Histogram):
            handle.cells, handle.mark = cells, mark
        handle.view = view
        handle.index = place


def _add(old: memoryview[float], indexes: Sequence[int], new: memoryview[float], places: Sequence[int]) -> None:
    for index, place in zip(indexes, places, strict=True):
        new[place] += old[index]
