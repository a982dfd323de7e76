"""``init(app)``: wires the probes, the store, the exporter and tracing into one process.

Nothing is opened when ``init`` is called: a preloading master only imports the app and must hold no slot,
no thread and no port. All that starts in :meth:`Runtime.first_serve`, when the process serves its first
scope, and again in a forked child when that one serves.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi_headroom import settings as settings_module
from fastapi_headroom.apps import Apps
from fastapi_headroom.errors import MissingExtraError, NotASGIError, SettingsError
from fastapi_headroom.exporter.election import Election
from fastapi_headroom.own_io import own_io
from fastapi_headroom.probes.base import Probe
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.caches.probe import LocalCachesProbe
from fastapi_headroom.probes.http_client import HttpClientProbe
from fastapi_headroom.probes.loop import LoopProbe
from fastapi_headroom.probes.pool import PoolProbe
from fastapi_headroom.probes.pools.probe import OtherPoolsProbe
from fastapi_headroom.probes.queue import QueueProbe
from fastapi_headroom.probes.registry import RegistrySnapshot
from fastapi_headroom.probes.request import RequestProbe
from fastapi_headroom.probes.runtime import RuntimeProbe
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer, redirected, watch_redirect
from fastapi_headroom.tracing.setup import Tracing

log = logging.getLogger("fastapi_headroom")
ASGIApp = Callable[..., Awaitable[None]]
MOST_DOUBLED = 1.0
"""Longest sample interval, in seconds, at which every other sample is left out while nothing happens. Gauges are up to
two seconds old then, less than a scrape interval; a library that is imported is still found within one."""
_lock = threading.RLock()
_runtime: Runtime | None = None


def init(
    app: Any,
    *,
    pools: Mapping[str, Any] | None = None,
    caches: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Handle:
    """Measure an app; return a handle whose ``shutdown()`` undoes it.

    FastAPI and Starlette apps are measured in place. Another ASGI callable is measured through the handle:
    ``app = headroom.init(app)``. ``pools`` and ``caches`` give engines, pools, Redis clients and caches in the process
    names of your own; all others are found and named by themselves. ``settings`` are the fields of
    :class:`~fastapi_headroom.settings.Settings`. A second ``init`` of the same app returns the same handle.

    Raises NotASGIError when ``app`` is not callable and SettingsError for a wrong argument.
    """
    if not callable(app):
        raise NotASGIError(
            f"init() needs an ASGI application, got {type(app).__name__}: call init(app) after app = FastAPI()"
        )
    with _lock, _open_runtime(settings) as runtime:
        if app in runtime.apps:
            log.info("fastapi-headroom: init() was called again for the same app; the first call stands")
            return runtime.apps.handle_of(app) or Handle(app, runtime)
        runtime.name(pools or {}, caches or {})
        return Handle(app, runtime)


def init_worker(
    app: Any = None,
    *,
    pools: Mapping[str, Any] | None = None,
    caches: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Handle:
    """Measure the processes of a job worker: each process that runs jobs claims a slot of its own.

    ``app`` is the Celery application, or the Dramatiq or TaskIQ broker. Call it in the module that the worker
    imports; a web app may import that too, there it does nothing. Without an app (RQ, arq, or a
    script) this process is measured from now on; an RQ worker measures for the work-horses that it forks.

    Raises SettingsError for a wrong argument, and when ``app`` is none of these.
    """
    from fastapi_headroom.probes import queue_workers

    with _lock, _open_runtime(settings) as runtime:
        runtime.name(pools or {}, caches or {})

        def begin() -> None:
            runtime.request.enabled = False
            runtime.first_serve()

        if app is None:
            begin()
        else:
            queue_workers.install(app, begin, runtime.stop)
        return runtime.apps.handle_of(None) or Handle(None, runtime)


class Handle:
    """What ``init`` returns: the way to undo it, and the app itself for a plain ASGI callable."""

    def __init__(self, app: Any, runtime: Runtime) -> None:
        self.app, self._runtime = app, runtime
        self._measured: ASGIApp | None = None if app is None else runtime.request.instrument(app)
        # An app that is served by itself can be dropped by its user; a wrapped one is served by us.
        runtime.apps.add(app, self, weakly=app is not None and self._measured is app)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._runtime.settings

    @property
    def writer(self) -> Writer | None:
        """What this process writes through; None until it serves."""
        return self._runtime.writer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Serve as the measured app."""
        if self._measured is None:
            raise NotASGIError("this handle belongs to a job worker and serves no requests")
        return await self._measured(scope, receive, send)

    def shutdown(self) -> None:
        """Stop measuring this app; with the last one every patched thing is put back. Idempotent."""
        global _runtime
        with _lock:
            if self._runtime.apps.handle_of(self.app) is not self:
                return
            self._runtime.apps.discard(self.app)
            if self.app is not None:
                self._runtime.request.uninstrument(self.app)
            if not self._runtime.apps:
                self._runtime.stop()
                self._runtime.unwatch()
                if _runtime is self._runtime:
                    _runtime = None


class Runtime:
    """What one process has of fastapi-headroom, however many apps it measures."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.apps: Apps[Handle] = Apps()
        self.writer: Writer | None = None
        self.tracing = Tracing(settings)
        self.loop = LoopProbe(settings)
        self.request = RequestProbe(
            settings,
            on_first_serve=self.first_serve,
            on_lifespan_end=self._flush,
            on_new_loop=self.loop.attach,
        )
        self.request.enabled = "request" not in settings.disable
        self.pool = PoolProbe(settings)
        self.other_pools = OtherPoolsProbe(settings.hold_threshold)
        self.cache = CacheProbe(settings)
        self.local_caches = LocalCachesProbe(self.cache)
        self.registry = RegistrySnapshot(settings)
        others: tuple[Probe, ...] = (
            self.pool,
            self.other_pools,
            self.cache,
            self.local_caches,
            HttpClientProbe(),
            self.loop,
            QueueProbe(settings),
            RuntimeProbe(settings),
            self.registry,
        )
        self.probes: tuple[Probe, ...] = tuple(p for p in (self.request, *others) if p.name not in settings.disable)
        self._election: Election | None = None
        self._stopping = threading.Event()
        self._started = False
        self._may_trace = False
        self._own_writer: Writer | None = None
        self.unwatch = watch_redirect(self._redirected)

    def name(self, pools: Mapping[str, Any], caches: Mapping[str, Any]) -> None:
        """Give engines, pools and caches the names that the user chose. Raises SettingsError for what is none."""
        for argument, given in (("pools", pools), ("caches", caches)):
            if not isinstance(given, Mapping):
                kind = type(given).__name__
                raise SettingsError(f"{argument} must map names to objects, got {kind}: {argument}={{'main': ...}}")
        self.pool.name_engines(self.other_pools.name_pools(pools))
        self.cache.name_clients(self.local_caches.name_caches(caches))

    def first_serve(self, kind: str = "worker") -> None:
        """Claim a slot, bind the probes and start the threads; once per process. Never raises.

        Traces start with the first request, not with the lifespan: many apps configure their provider there.
        """
        with _lock:
            try:
                if not self._started:
                    self._started = True
                    self._start()
                if kind != "lifespan":
                    self._trace()
                    self.request.sample()
            except Exception:
                log.exception(
                    "fastapi-headroom: could not start, this process is not measured; the app is not affected"
                )

    def _start(self) -> None:
        writer = self.writer = self._open_store()
        captured = redirected() is not None
        self._bind(writer)
        self._stopping = threading.Event()
        threading.Thread(target=self._sample, args=(self._stopping,), name="headroom-sampler", daemon=True).start()
        if captured:
            return
        self._own_writer = writer
        if self.settings.exporter:
            self._election = Election(self.settings)
            self._election.start()
        with own_io():
            where = self._where(writer)
        log.info("fastapi-headroom: %s", where)

    def _bind(self, writer: Writer) -> None:
        for probe in self.probes:
            try:
                probe.guard.bind(writer)
                probe.bind(writer)
            except MissingExtraError as error:
                log.warning("fastapi-headroom: the %s probe is off: %s", probe.name, error)
            except Exception as error:
                probe.guard.failed(error)

    def _redirected(self) -> None:
        """Write to where ``testing.capture_metrics`` says, and back to the store at its end."""
        with _lock:
            if not self._started:
                return
            writer = redirected() or self._own_writer
            if writer is not None:
                self.writer = writer
                self._bind(writer)
            else:  # first served inside the block: start anew, with a store, when it serves again
                self._stopping.set()
                self.forked()

    def _open_store(self) -> Writer:
        with own_io():
            return Writer.open(
                self.settings.store_directory,
                group_readable=self.settings.group_readable,
                max_series=self.settings.max_series,
            )

    def _where(self, writer: Writer) -> str:
        text = f"worker {writer.worker} writes to {self.settings.store_directory}"
        if self.settings.exporter:
            scheme = "https" if self.settings.exporter_certificate_file else "http"
            text += f", /metrics on {scheme}://{self.settings.host}:{self.settings.port}"
            if self.settings.host in ("127.0.0.1", "localhost") and Path("/.dockerenv").exists():
                text += " (inside this container only: set HEADROOM_HOST=0.0.0.0 to be scraped from outside)"
        return text

    def _trace(self) -> None:
        self._may_trace = True
        with own_io():  # the packages of OpenTelemetry look for their metadata
            self.request.owns_tracing = self.tracing.start(*self.apps.living())

    def _sample(self, stopping: threading.Event) -> None:
        may_leave_out = self.settings.sample_interval <= MOST_DOUBLED
        sampled, modules = False, 0
        while not stopping.wait(self.settings.sample_interval):
            self._tend()
            if sampled and may_leave_out and self.loop.at_rest and len(sys.modules) == modules:
                sampled = False
                continue
            sampled, modules = True, len(sys.modules)
            if self._may_trace:
                self._trace()  # an app or SQLAlchemy may have come since
            for probe in self.probes:
                try:
                    probe.sample()
                except Exception as error:
                    probe.guard.failed(error)

    def _tend(self) -> None:
        writer = self._own_writer
        try:
            if writer is not None:
                writer.tend()
        except Exception:
            log.debug("fastapi-headroom: the store could not be tended", exc_info=True)

    def _flush(self) -> None:
        """Hand over what is collected at intervals: the process may end now."""
        with own_io():
            self.registry.flush()
            self.tracing.flush()

    def stop(self) -> None:
        """Undo all that ``first_serve`` did."""
        with _lock, own_io():
            self._stopping.set()
            if self._election is not None:
                self._election.stop()
                self._election = None
            self.tracing.stop()  # first: its wraps lie on top of the probes'
            for probe in self.probes:
                try:
                    probe.close()
                except Exception as error:
                    probe.guard.failed(error)
            if self._own_writer is not None:
                self._own_writer.close()
            self.writer = self._own_writer = None
            self._started = self._may_trace = False

    def forked(self) -> None:
        """Forget the parent's threads and slot: they are not in this child. It starts when it serves."""
        self._started = self._may_trace = False
        self._election = None
        self.writer = self._own_writer = None
        self.request.rearm()


@contextmanager
def _open_runtime(arguments: Mapping[str, Any]) -> Iterator[Runtime]:
    """Hand out the process' runtime. One that was opened for a call that fails is gone, and its settings with it."""
    global _runtime
    fresh = _runtime is None
    if _runtime is None:
        _runtime = Runtime(settings_module.load(**arguments))
    elif arguments:
        log.warning(
            "fastapi-headroom: the settings of a second init() are ignored (%s); give them to the first",
            ", ".join(sorted(arguments)),
        )
    runtime = _runtime
    try:
        yield runtime
    except BaseException:
        if fresh:
            runtime.stop()
            runtime.unwatch()
            _runtime = None
        raise


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    if _runtime is not None:
        _runtime.forked()


os.register_at_fork(after_in_child=_after_fork)
