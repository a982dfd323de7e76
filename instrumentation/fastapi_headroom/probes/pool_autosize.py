"""``autosize(engine, ...)``: the limit of a live pool follows its load, within a budget that all workers share.

A thread looks twice a second at what the pool probe measured, asks ``advice.autosizing`` for the next size, claims it
from the other workers (``store.claims``) and moves the limit (``pool_resize``). Nothing runs in a checkout for it.
See docs/pool-autosize.md and docs/adr/0008-autosize.md.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.probes.pool_bounds import Bounds
from fastapi_headroom.probes.pool_names import base_engine
from fastapi_headroom.probes.pool_resize import limits_of
from fastapi_headroom.probes.pool_sizing import Sizing
from fastapi_headroom.store.writer import redirected

if TYPE_CHECKING:
    from fastapi_headroom.probes.pool import PoolProbe
    from fastapi_headroom.store.writer import Writer

log = logging.getLogger("fastapi_headroom")
TICK: Final = 0.5
"""Seconds between two looks."""
_ENGINE: Final = "give what create_engine() or create_async_engine() returned"
_QUEUE_POOL: Final = (
    "autosize() moves the limit of a QueuePool; this engine has {found}, which has no limit to move: leave poolclass= "
    "out of create_engine() or create_async_engine(), or give poolclass=QueuePool or AsyncAdaptedQueuePool"
)
_sized: WeakKeyDictionary[Any, Autosize] = WeakKeyDictionary()
_running: Autosizers | None = None


def autosize(
    engine: Any, minimum: int, maximum: int, budget: int, *, workers: int | None = None, patience: float = 30.0
) -> Autosize:
    """Let the limit of an engine's pool follow its load; return a handle whose ``stop()`` ends that.

    ``engine`` is sync or async, with a QueuePool of either kind. Each worker's pool has ``minimum`` to ``maximum``
    connections, and those of all workers of this host together no more than ``budget``. ``workers`` is how many there
    will be (default: the setting ``expected_workers``): it keeps room for the ``minimum`` of each. The pool shrinks to
    what was needed in the last ``patience`` seconds. It begins when ``init`` has started to measure this process; a
    second call for the same engine changes the bounds.

    Raises SettingsError for what is no engine, for a pool without a limit, and for bounds that contradict each other.
    """
    owner = base_engine(engine)
    if not hasattr(owner, "dialect") or not hasattr(owner, "pool"):
        raise SettingsError(f"autosize({type(engine).__name__}) is no SQLAlchemy engine; {_ENGINE}")
    from sqlalchemy.pool import QueuePool

    if not isinstance(owner.pool, QueuePool):
        raise SettingsError(_QUEUE_POOL.format(found=type(owner.pool).__name__))
    bounds = Bounds(minimum, maximum, budget, workers, patience)
    bounds.check()
    before = _sized.get(owner)
    original = limits_of(owner.pool) if before is None else before.original
    if before is not None:
        before.stop()
    handle = _sized[owner] = Autosize(owner, bounds, original)
    if _running is not None:
        _running.add(handle)
    return handle


class Autosize:
    """The autosizing of one engine."""

    def __init__(self, engine: Any, bounds: Bounds, original: tuple[int, int]) -> None:
        self.engine: weakref.ref[Any] = weakref.ref(engine)
        self.bounds, self.original = bounds, original
        self.sizing: Sizing | None = None

    @property
    def active(self) -> bool:
        """Whether the limit is being moved: only while this process is measured."""
        return self.sizing is not None

    @property
    def limit(self) -> int | None:
        """Connections that this worker's pool may open now; None while not active."""
        return None if self.sizing is None or self.engine() is None else self.sizing.limit

    def stop(self) -> None:
        """Put the original limit back for good. Idempotent."""
        engine = self.engine()
        if engine is not None and _sized.get(engine) is self:
            del _sized[engine]
        sizing, self.sizing = self.sizing, None
        if sizing is not None:
            sizing.close()


class Autosizers:
    """All of this process, and the thread that looks after them. Part of the pool probe."""

    def __init__(self, probe: PoolProbe) -> None:
        self._probe = probe
        self._writer: Writer | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def bind(self, writer: Writer) -> None:
        """Begin with every engine that was given to ``autosize``, now and later."""
        global _running
        self.close()
        self._writer, _running = writer, self
        for handle in list(_sized.values()):
            self.add(handle)

    def add(self, handle: Autosize) -> None:
        """Begin with one engine. Never raises: its pool stays as it is then."""
        engine, writer = handle.engine(), self._writer
        if engine is None or writer is None or handle.sizing is not None:
            return
        try:
            settings = self._probe.settings
            bounds = handle.bounds.within(settings.expected_workers)
            state = self._probe.state_of(engine.pool, engine)
            if state is None:
                return
            path = None if redirected() else _claims_of(settings.store_directory, state.series.name)
            mode = 0o640 if settings.group_readable else 0o600
            handle.sizing = Sizing(engine, bounds, handle.original, self._probe, writer, path, mode)
        except SettingsError as error:
            log.error("fastapi-headroom: autosize is off: %s", error)
            return
        except Exception as error:
            self._probe.guard.failed(error)
            return
        if self._thread is None:
            self._stopping = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(self._stopping,), name="headroom-autosize", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Put all limits back; ``bind`` begins anew. Idempotent."""
        global _running
        if _running is self:
            _running = None
        self._stopping.set()
        thread, self._thread, self._writer = self._thread, None, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(0.2)  # it may wait for a disk; what it does after that it does to nothing
        for handle in list(_sized.values()):
            sizing, handle.sizing = handle.sizing, None
            if sizing is not None:
                sizing.close()

    def forget(self) -> None:
        """In a forked child: the thread is the parent's."""
        self._thread = self._writer = None

    def _run(self, stopping: threading.Event) -> None:
        while not stopping.wait(TICK):
            for handle in list(_sized.values()):
                sizing = handle.sizing
                try:
                    if sizing is not None:
                        sizing.tick()
                except Exception as error:
                    self._probe.guard.failed(error)


def _claims_of(directory: Path, pool: str) -> Path:
    """Return the file of a pool's claims: pools of the same name share a budget."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", pool)[:40]
    return directory / f"pool-{slug}-{zlib.crc32(pool.encode()):08x}.claims"


def _after_fork_in_child() -> None:
    global _running
    running, _running = _running, None
    if running is not None:
        running.forget()
    for handle in list(_sized.values()):
        sizing, handle.sizing = handle.sizing, None
        if sizing is not None:
            sizing.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
