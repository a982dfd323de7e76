"""Elect one worker to export the store while no sidecar does.

Every worker runs a thread that tries for ``exporter.lock`` twice a second; the one that has it looks once a second
whether it still may. The lock dies with its holder, so when the exporting worker is killed another one serves within a
second. A sidecar holds ``sidecar.lock``: the elected worker then frees the port, and takes over again when the sidecar
is gone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from fastapi_headroom.errors import HeadroomError
from fastapi_headroom.exporter.locks import EXPORTER_LOCK, SIDECAR_LOCK, FileLock, is_held, provide
from fastapi_headroom.exporter.service import Exporter
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.reader import held_here

log = logging.getLogger("fastapi_headroom")

INTERVAL = 0.5
"""Seconds between two looks at the locks, of a worker that waits to be elected."""
SERVING_INTERVAL = 1.0
"""The same of the elected one. When it dies the others' looks count."""
_PORT_RETRY_SECONDS = 3.0


class Election:
    """One worker's candidacy. After a fork the child's copy is idle, and may be started anew."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._directory: Path = settings.store_directory
        self._mode = 0o640 if settings.group_readable else 0o600
        self._reset()

    def _reset(self) -> None:
        self._lock: FileLock | None = None
        self._exporter: Exporter | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._port_retry_at = 0.0
        self._warned = False

    @property
    def url(self) -> str | None:
        """The address of the metrics while this worker exports them, else None."""
        exporter = self._exporter
        return exporter.url if exporter is not None else None

    def start(self) -> None:
        """Stand for election, on a daemon thread. Idempotent."""
        if self._thread is None:
            _standing.add(self)
            self._thread = threading.Thread(
                target=self._run, args=(self._stopping,), name="headroom-election", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Free port and lock, at once if they are held. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            self._stopping = threading.Event()
            thread.join(timeout=2.0)
            _standing.discard(self)

    def _run(self, stopping: threading.Event) -> None:
        failed = False
        while not stopping.is_set():
            try:
                self._step()
            except Exception:
                if not failed:
                    log.exception("fastapi-headroom: the exporter's election failed and goes on trying")
                failed = True
            stopping.wait(INTERVAL if self._exporter is None else SERVING_INTERVAL)
        self._step_down()

    def _step(self) -> None:
        if is_held(self._directory / SIDECAR_LOCK):
            if self._exporter is not None:
                log.info("fastapi-headroom: a sidecar serves %s now; this worker stands aside", self._directory)
            self._step_down()
            return
        if self._lock is not None and not self._lock.is_current():
            self._step_down()  # the directory was deleted; whoever locks its successor first exports it
        if self._exporter is not None and not self._exporter.alive:
            log.warning("fastapi-headroom: the exporter ended unexpectedly and is started anew")
            self._step_down()
        if self._exporter is not None and self._lock is None and not self._may_serve():
            self._step_down()  # the directory can be used again, and another worker was elected there
        if self._exporter is None and time.monotonic() >= self._port_retry_at:
            self._try_to_serve()

    def _may_serve(self) -> bool:
        """Take the lock and return whether this worker may export.

        Where the directory cannot be used nobody can be elected: who gets the port exports what it has in memory.
        """
        if self._lock is None:
            try:
                self._lock = FileLock.acquire(self._directory / EXPORTER_LOCK, mode=self._mode)
                provide(self._directory / SIDECAR_LOCK, mode=self._mode)
            except OSError as error:
                log.debug("fastapi-headroom: no election in %s: %s", self._directory, error)
                return self._lock is not None or held_here(self._directory)
        return self._lock is not None

    def _try_to_serve(self) -> None:
        with _no_fork:
            if not self._may_serve():
                return
            try:
                exporter = Exporter(self._settings)
            except HeadroomError as error:
                # the lock is kept: one worker warns and tries again, not all of them
                self._port_retry_at = time.monotonic() + _PORT_RETRY_SECONDS
                if not self._warned:
                    log.warning("fastapi-headroom: metrics are not exported: %s; it is tried again meanwhile", error)
                self._warned = True
                return
            self._exporter = exporter
        exporter.start()
        self._warned = False
        log.info("fastapi-headroom: metrics at %s from %s", exporter.url, self._directory)

    def _step_down(self) -> None:
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.stop()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _abandon(self) -> None:
        """Close what a forked child inherited: its parent, or its parent's successor, must be able to export."""
        if self._exporter is not None:
            self._exporter.abandon()
        if self._lock is not None:
            self._lock.release()
        self._reset()


_standing: set[Election] = set()
_no_fork = threading.Lock()
"""Held while lock and port are taken: a fork in between would leave copies that nobody closes in the child."""
_forking = threading.local()


def _before_fork() -> None:
    _forking.held = _no_fork.acquire(timeout=1.0)


def _after_fork_in_parent() -> None:
    if _forking.held:
        _no_fork.release()


def _after_fork_in_child() -> None:
    global _no_fork
    _no_fork = threading.Lock()
    for election in list(_standing):
        election._abandon()
    _standing.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
