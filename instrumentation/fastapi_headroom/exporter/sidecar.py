"""The sidecar process: serves a store for as long as it runs, whatever happens to the app."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from types import FrameType

from fastapi_headroom.errors import HeadroomError, PortInUseError, StoreError
from fastapi_headroom.exporter import elsewhere
from fastapi_headroom.exporter.locks import EXPORTER_LOCK, SIDECAR_LOCK, FileLock, is_held, slots_alive
from fastapi_headroom.exporter.service import Exporter
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.slot import prepare_directory

log = logging.getLogger("fastapi_headroom")

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
_TEND_SECONDS = 0.5
_HANDOVER_SECONDS = 5.0
"""How long an elected worker may take to free the port."""
_LONELY_SECONDS = 10.0
"""How long a sidecar waits for the first worker before it says that there is none; apps take some seconds to start."""


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT and return the exit status; what hinders the start is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    _raise_descriptor_limit()
    try:
        sidecar = Sidecar(settings)
    except HeadroomError as error:
        print(f"headroom sidecar: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    log.info("fastapi-headroom: metrics at %s from %s", sidecar.exporter.url, settings.store_directory)
    while not stop.wait(_TEND_SECONDS):
        if not sidecar.exporter.alive:
            log.error("fastapi-headroom: the sidecar's server ended unexpectedly; start the sidecar again")
            return EXIT_FAILED
        sidecar.tend()
    sidecar.stop()
    return 0


def _raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us: the reader keeps the store's files open between scrapes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Sidecar:
    """Holds ``sidecar.lock``, so that elected workers stand aside, and serves the store.

    Raises HeadroomError when the directory or the port cannot be used, or another sidecar serves the store.
    """

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.store_directory
        self._mode = 0o640 if settings.group_readable else 0o600
        if not self._directory.is_dir():
            prepare_directory(self._directory, group_readable=settings.group_readable)
        lock = self._take_lock()
        if lock is None:
            raise StoreError(
                f"another sidecar serves {self._directory}: stop it, or name another directory with --dir or "
                "HEADROOM_DIRECTORY"
            )
        self._lock = lock
        self._ask_for_workers_at: float | None = time.monotonic() + _LONELY_SECONDS
        try:
            self.exporter = self._listen(settings)
        except HeadroomError:
            lock.release()
            raise
        self.exporter.start()

    def tend(self) -> None:
        """Take the lock anew when the directory was deleted and has come back. Called twice a second."""
        self._say_when_lonely()
        if self._lock.is_current() or not os.path.isdir(self._directory):  # noqa: PTH112 - Path's raises without rights
            return
        try:
            lock = self._take_lock()
        except HeadroomError as error:
            log.debug("fastapi-headroom: %s", error)
            return
        if lock is not None:
            self._lock.release()
            self._lock = lock
            log.info("fastapi-headroom: %s was made anew and is served again", self._directory)

    def _say_when_lonely(self) -> None:
        """Say once that no worker has come: most likely the app was given another name, or none."""
        if self._ask_for_workers_at is None or time.monotonic() < self._ask_for_workers_at:
            return
        self._ask_for_workers_at = None
        if not slots_alive(self._directory):
            log.warning(
                "fastapi-headroom: no worker writes to %s so far: %s",
                self._directory,
                elsewhere.writing(self._directory),
            )

    def stop(self) -> None:
        """Free the port, then the lock: a worker that is elected next finds the port free."""
        self.exporter.stop()
        self._lock.release()

    def _take_lock(self) -> FileLock | None:
        path = self._directory / SIDECAR_LOCK
        try:
            return FileLock.acquire(path, mode=self._mode)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be locked ({error.strerror}): run the sidecar as the app's user, or in its group after "
                "an app with HEADROOM_GROUP_READABLE=true has started, or name another directory with --dir or "
                "HEADROOM_DIRECTORY"
            ) from error

    def _listen(self, settings: Settings) -> Exporter:
        """Listen; an elected worker that has the port sees the lock and frees it within a second or so."""
        deadline = time.monotonic() + _HANDOVER_SECONDS
        while True:
            worker_exports = is_held(self._directory / EXPORTER_LOCK)
            try:
                return Exporter(settings)
            except PortInUseError as error:
                if not worker_exports or time.monotonic() > deadline:
                    raise PortInUseError(f"{error}{elsewhere.exporting(self._directory)}") from error
            time.sleep(0.05)
