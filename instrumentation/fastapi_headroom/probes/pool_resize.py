"""Moving the limit of a live SQLAlchemy pool: QueuePool and AsyncAdaptedQueuePool.

A pool counts its *places*: connections that are checked out or lie ready, broken ones included. It has no field for
them, but ``maxsize + _overflow`` of it is their number at any size; so the limit moves by changing both. While we do,
the limit is all size and no overflow, as overflow connections are closed at each checkin.

*Up*: whoever waits sleeps in the queue and is not woken by a higher limit. A record without a connection is put into
the queue for each: they get it, and open the connection themselves, as they would open one in place of a broken one.

*Down*: first what lies ready goes, without a connection or the longest unused; if that is not enough, connections are
closed as they come back, as the pool itself closes overflow connections. What is checked out is never taken, and the
limit never falls below it.

The pool takes a limit of 0 for no limit at all. So an empty pool that may open nothing has a place that is no place
(``_phantom``): whoever asks waits.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

_RETURN: Final = "_do_return_conn"


class Resizer:
    """The limit of one pool. Its methods may be called from any thread where the pool is one for threads, and on the
    event loop's thread only where it is one for asyncio, save for the properties."""

    def __init__(self, pool: Any, original: tuple[int, int], waiting: Callable[[], int]) -> None:
        """``original`` is size and overflow to put back, ``waiting`` tells how many checkouts wait."""
        self._pool = weakref.ref(pool)  # a pool refers to its engine, and whoever drops that must be rid of it
        self._original, self._waiting = original, waiting
        self._lock = threading.RLock()
        self._target = 1 << 30
        self._phantom = 0
        self.closing = 0
        """Connections that are no places any more, but not closed yet."""

    @property
    def pool(self) -> Any:
        """The pool. Raises ReferenceError when it is gone."""
        pool = self._pool()
        if pool is None:
            raise ReferenceError("the pool is gone")
        return pool

    @property
    def pool_if_there(self) -> Any:
        """The pool, None when it is gone."""
        return self._pool()

    @property
    def places(self) -> int:
        """Connections that are open, in the making, or broken and to be opened again."""
        with self._lock:
            return int(self.pool._pool.maxsize + self.pool._overflow - self._phantom)

    @property
    def limit(self) -> int:
        """Connections that the pool may have open."""
        with self._lock:
            return int(self.pool._pool.maxsize + max(0, self.pool._max_overflow) - self._phantom)

    @property
    def used(self) -> int:
        """Places that are checked out."""
        with self._lock:
            return max(0, self.places - len(_ready(self.pool._pool)))

    def resize(self, target: int) -> list[Any]:
        """Move the limit to ``target``, or as near as what is checked out allows; the rest of the way follows.

        Returns connection records that were taken out, for the caller to close.
        """
        with self._lock:
            with self._mutex():
                dropped = self._drop(self.places - target)
                self._target = target
                places = self._settle(len(dropped))
            self.closing += len(dropped)
            if places > target:
                self.pool.__dict__[_RETURN] = self._return
            else:
                self.pool.__dict__.pop(_RETURN, None)
        self.wake()
        return dropped

    def restore(self) -> list[Any]:
        """Put the original limit back, and leave the pool alone. Returns records for the caller to close."""
        pool, (size, overflow) = self.pool, self._original
        with self._lock:
            pool.__dict__.pop(_RETURN, None)
            with self._mutex():
                # Only the queue for threads must not hold more than its size; asyncio's gives up what is too much.
                dropped = self._drop(len(_ready(pool._pool)) - size) if size and not pool._is_asyncio else []
                gone = len(dropped)
                with pool._overflow_lock:  # no calls in here, see _settle
                    pool._overflow = pool._pool.maxsize + pool._overflow - self._phantom - gone - size
                    pool._max_overflow = overflow
                    pool._pool.maxsize = size
                    self._phantom = 0
                _tell(pool._pool, size)
            self.closing += gone
        self.wake()
        return dropped

    def forget(self) -> None:
        """Leave the pool without a lock: in a forked child another thread of the parent may have held it."""
        pool = self.pool
        pool.__dict__.pop(_RETURN, None)
        pool._overflow -= self._phantom
        self._phantom = 0

    def retire(self, held: int) -> None:
        """Close what comes back to a pool that the engine has replaced, of which so many are checked out."""
        with self._lock:
            self._target = 0
            with self.pool._overflow_lock:
                self.pool._overflow = held - self.pool._pool.maxsize
                self._phantom = 0
            self.pool.__dict__[_RETURN] = self._return

    def wake(self) -> bool:
        """Give those who wait the room that there is. Returns whether there was somebody and some room.

        Where a newcomer was faster, the one that was woken sleeps again: call it again a moment later.
        """
        from sqlalchemy.pool.base import _ConnectionRecord
        from sqlalchemy.util.queue import Full

        pool, woken = self.pool, False
        if pool._max_overflow < 0 or (pool._is_asyncio and loop_of(pool) is None):
            return False  # nobody ever waits, or nobody did so far
        while self._waiting() > len(_ready(pool._pool)) and pool._inc_overflow():
            try:
                pool._pool.put(_ConnectionRecord(pool, connect=False), False)
            except Full:
                pool._dec_overflow()
                break
            woken = True
        return woken

    def _drop(self, number: int) -> list[Any]:
        """Take so many out of those that lie ready. The caller holds the queue's mutex."""
        ready = _ready(self.pool._pool)
        records = sorted(ready, key=lambda record: record.dbapi_connection is not None)[: max(0, number)]
        for record in records:
            ready.remove(record)
        return records

    def _settle(self, gone: int) -> int:
        """Set the limit to the target or to the places that there are, whichever is more; return the places."""
        pool, target = self.pool, self._target
        queue = pool._pool
        with pool._overflow_lock:
            # No calls in here: the garbage collector could run, give a leaked connection back, and want this lock.
            places: int = queue.maxsize + pool._overflow - self._phantom - gone
            limit = target if target > places else places
            phantom = 0 if limit else 1
            pool._overflow = places - limit
            pool._max_overflow = 0
            queue.maxsize = limit + phantom
            self._phantom = phantom
        _tell(queue, limit + phantom)
        return places

    def _return(self, record: Any) -> None:
        """Take a connection that comes back: close it while there are more than there should be."""
        pool = self.pool
        with self._lock:
            retired = self.places > self._target
            if retired:
                with self._mutex():
                    places = self._settle(1)
                self.closing += 1
                if places <= self._target:
                    pool.__dict__.pop(_RETURN, None)
            elif pool.__dict__.get(_RETURN) is not None:
                pool.__dict__.pop(_RETURN, None)
        if retired:
            self.close(record)
        else:
            pool._do_return_conn(record)

    def close(self, record: Any) -> None:
        """Close the connection of a record that was taken out."""
        try:
            record.close()
        finally:
            with self._lock:
                self.closing -= 1

    def _mutex(self) -> contextlib.AbstractContextManager[Any]:
        return getattr(self.pool._pool, "mutex", None) or contextlib.nullcontext()


def limits_of(pool: Any) -> tuple[int, int]:
    """Return size and overflow as a pool has them now."""
    return int(pool._pool.maxsize), int(pool._max_overflow)


def loop_of(pool: Any) -> Any:
    """Return the event loop that an async pool's waiters sleep on, None while nobody ever waited."""
    return getattr(vars(pool._pool).get("_queue"), "_loop", None)


def _ready(queue: Any) -> Any:
    """Return the container of the records that lie ready, an empty one where there is none yet."""
    if hasattr(queue, "mutex"):
        return queue.queue
    return getattr(vars(queue).get("_queue"), "_queue", ())


def _tell(queue: Any, size: int) -> None:
    """Tell the asyncio queue within SQLAlchemy's, if it was made already."""
    inner = vars(queue).get("_queue")
    if inner is not None:
        inner._maxsize = size
