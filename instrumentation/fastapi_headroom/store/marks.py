"""Marks: which blocks of a file of histograms were written to, so that a reader need not read the rest.

The last 12 KiB of our own histogram and summary files, far behind the entries that prometheus_client looks at, hold
three arrays of 512 doubles:

- *starts*: a constant that says that marks are kept here, then the offset in bytes of each block, ascending, 0 where
  there is none. A block holds whole series; it reaches to the start of the next one, the last one to the end.
- *flags*: 1 where something was written since the last ``settle``. A handle sets it **before** it changes a value,
  within one uninterrupted step, so a worker that is killed in between leaves a flag too many, never one too few.
- *generations*: raised by ``settle``, about once a second, when it takes a flag away, in one uninterrupted step too.

So a block whose flag is 0 and whose generation is the one seen before is as it was. A reader asks for the flags first
and for the generations with a second read: if ``settle`` comes in between it sees the new generation. Block 0 stands
for the whole file. Values that nobody marks (counters, gauges) are in files that are small and read as a whole.
"""

from __future__ import annotations

import random
import struct
from bisect import bisect_right
from collections.abc import Iterable

from fastapi_headroom.store.handles import counting_lock

PLACES = 512
AREA = PLACES * 8
TABLE = 3 * AREA
"""Bytes at the end of a file that are not for entries."""
MAGIC = struct.pack("d", 5_471_984_016.0)
BLOCK = 16 << 10
"""Bytes from which on a block is closed."""
WHOLE_FILE = 0


class Marks:
    """The writing side: the table at the end of one mapping. Callers hold the writer's lock."""

    __slots__ = ("_first", "_starts", "_view")

    def __init__(self, view: memoryview[float], capacity: int) -> None:
        self._view = view
        self._first = (capacity - TABLE) // 8
        self._starts: list[int] = []

    def begin(self, offsets: Iterable[int]) -> None:
        """Lay out blocks anew over the series that begin at these offsets, and call all of it written to."""
        view, first = self._view, self._first
        view[first + PLACES] = 1.0
        for index in range(first + 1, first + PLACES):
            view[index] = view[index + PLACES] = 0.0
        self._starts = []
        for offset in offsets:
            self.extend(offset)
        view[first + 2 * PLACES] = float(random.getrandbits(40))  # no other owner's generation
        view[first] = struct.unpack("d", MAGIC)[0]

    def extend(self, offset: int) -> None:
        """Take note of new series from an offset on, before readers learn of them."""
        starts = self._starts
        if not starts or (offset - starts[-1] >= BLOCK and len(starts) < PLACES - 1):
            starts.append(offset)
            self._view[self._first + len(starts)] = float(offset)

    def index(self, cells: Iterable[int]) -> int:
        """Return the index of the flag for values at these indexes: that of their block, or of the whole file."""
        numbers = {bisect_right(self._starts, cell * 8) for cell in cells}
        return self._first + PLACES + (numbers.pop() if len(numbers) == 1 else WHOLE_FILE)

    def flag_all(self) -> None:
        """Call the whole file written to."""
        self._view[self._first + PLACES] = 1.0

    def settle(self) -> None:
        """Turn flags into generations."""
        view = self._view
        flags = self._first + PLACES
        for index in range(flags, flags + 1 + len(self._starts)):
            if view[index]:
                with counting_lock():
                    # One uninterrupted step: a write lies before both or after both.
                    view[index + PLACES] += 1.0
                    view[index] = 0.0


def are_kept_in(name: str) -> bool:
    """Return whether a file of this name keeps marks, if it is ours."""
    return name.startswith(("histogram", "summary"))
