"""How busy the thread is, or the process, that the checkouts of a pool run on."""

from __future__ import annotations

import time

from fastapi_headroom.probes import procfs


class Busy:
    """Not for concurrent use."""

    def __init__(self) -> None:
        self._before: tuple[float, float, int | None] | None = None
        self._thread: tuple[int, procfs.ThreadStat] | None = None

    def share(self, thread: int | None) -> float:
        """Return the share of the time since the last call for which a thread (native id) ran or wanted to run.

        Without a thread it is the CPU time of the process: with the GIL it has one core. 0 at the first call.
        """
        if thread is not None and (self._thread is None or self._thread[0] != thread):
            self.close()
            self._thread = thread, procfs.ThreadStat(thread)
        times = self._thread[1].times() if self._thread is not None else None
        now, spent = time.monotonic(), time.process_time() if times is None else times.on_cpu + times.waiting
        before, self._before = self._before, (now, spent, None if times is None else thread)
        if before is None or before[2] != self._before[2] or now <= before[0]:
            return 0.0
        return (spent - before[1]) / (now - before[0])

    def close(self) -> None:
        """Release what is open. Idempotent."""
        if self._thread is not None:
            self._thread[1].close()
        self._thread = None
