"""Requests: duration, latency, traffic, errors, sizes, and where the time went.

Measures from outside an app's whole stack by a class-level wrap of ``__call__`` that acts for initialised apps
only: a middleware that wrapped the app would lie inside those that are added later.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from asyncio import _get_running_loop as running_loop
from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter
from types import CoroutineType
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette._utils import get_route_path
from starlette.applications import Starlette

from fastapi_headroom import catalog, holds
from fastapi_headroom.catalog import Metric
from fastapi_headroom.driver import Begun, DrivenOther
from fastapi_headroom.holds import SHORT, note_step
from fastapi_headroom.ledger import SCOPE_KEY, Ledger, current, in_flight
from fastapi_headroom.probes import arrival, routes
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.conversation import Conversation
from fastapi_headroom.probes.exchange import UNMATCHED
from fastapi_headroom.probes.measured_app import MeasuredApp
from fastapi_headroom.probes.names import OTHER
from fastapi_headroom.probes.request_series import METHODS, Table
from fastapi_headroom.probes.request_tasks import TaskHook
from fastapi_headroom.probes.server_timing import exchange_class
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
Call = Callable[..., Any]
_CLASSES: tuple[type[Any], ...] = (FastAPI, Starlette)
_TELEMETRY_KEY = "fastapi.telemetry"
_RETURNED = object()
"""In place of what a coroutine waits for, once it has returned."""


class RequestProbe:
    """Measures the requests of the apps given to ``instrument``.

    ``on_first_serve`` is called with the kind of scope before the first lifespan and before the first request of a
    process: it binds the probes, and traces once the lifespan had its chance to configure that. ``on_lifespan_end``
    is called when the app has stopped, and ``on_new_loop`` when a process goes on with another event loop, as under
    ``TestClient`` and with several calls of ``asyncio.run``. ``owns_tracing`` says that server spans are made by us.
    """

    name: ClassVar[str] = "request"
    metrics: ClassVar[tuple[Metric, ...]] = catalog.of_stem("request")

    def __init__(
        self,
        settings: Settings,
        on_first_serve: Callable[[str], None] | None = None,
        on_lifespan_end: Callable[[], None] | None = None,
        on_new_loop: Callable[[asyncio.AbstractEventLoop], None] | None = None,
    ) -> None:
        self.guard = Guard(self.name)
        self.enabled = True
        self.owns_tracing = False
        self._settings = settings
        self._on_first_serve = on_first_serve
        self._on_lifespan_end = on_lifespan_end
        self._on_new_loop = on_new_loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._served = on_first_serve is None
        self._lock = threading.Lock()
        self._apps: dict[int, MeasuredApp] = {}
        self._put_on: dict[type[Any], tuple[Call, Call]] = {}
        self._table: Table | None = None
        self._tasks = TaskHook()
        self._excludes = bool(settings.excluded_paths)
        self._excluded = frozenset(path for path in settings.excluded_paths if not path.endswith("*"))
        self._excluded_prefixes = tuple(path[:-1] for path in settings.excluded_paths if path.endswith("*"))

    def instrument(self, app: Any) -> ASGIApp:
        """Measure an app. Returns the app itself, or a wrapper when it is not of FastAPI's or Starlette's classes."""
        known = self._apps.get(id(app))
        if known is not None:
            return known.served_by or app  # type: ignore[no-any-return]
        cls = next((cls for cls in _CLASSES if isinstance(app, cls)), None)
        if cls is None:
            wrapper = Wrapper(app, self)
            measured = self._apps[id(wrapper)] = self._apps[id(app)] = MeasuredApp(lambda: app, wrapper)
        else:
            key, apps = id(app), self._apps
            measured = apps[key] = MeasuredApp(weakref.ref(app, lambda _: apps.pop(key, None)), None)
            self._wrap_class(cls)
        if self._table is not None:
            self._look_at(measured, self._table)
        return app if cls is not None else wrapper

    def uninstrument(self, app: Any) -> None:
        """Stop measuring an app. Idempotent."""
        measured = self._apps.pop(id(app), None)
        if measured is not None:
            self._apps.pop(id(measured.served_by), None)
        if not self._apps:
            self._unwrap_classes()

    def bind(self, writer: Writer) -> None:
        """Resolve the series of every route, and drive the tasks of the running loop."""
        if not self.enabled:
            return
        self.guard.bind(writer)
        self._table = Table(writer, self._add_routes)
        self._ask_again()
        self._add_routes()
        self.sample()
        routes.attach(self.guard)
        self._loop = running_loop()
        if self._loop is not None:  # else not on an asyncio loop: tasks of requests are not driven
            self._tasks.attach(self._loop)

    def sample(self) -> None:
        """Find out whether FastAPI's own telemetry is wanted; see ``MeasuredApp.telemetry_dormant``."""
        for measured in list(self._apps.values()):
            self._look_for_telemetry(measured)

    def rearm(self) -> None:
        """Forget a parent process: the first scope calls ``on_first_serve`` again."""
        self._table = None
        self._ask_again()
        self._loop = None
        in_flight.clear()
        self._lock = threading.Lock()
        self._served = self._on_first_serve is None

    def close(self) -> None:
        """Put everything back. The apps go on, unmeasured."""
        self._table = None
        self._ask_again()
        self._apps.clear()
        self._unwrap_classes()
        routes.detach(self.guard)
        self._tasks.detach()

    def _add_routes(self) -> None:
        """Announce the routes of all apps: after bind, and when a request found a route that is new."""
        table = self._table
        if table is None:
            return
        table.announce(UNMATCHED)
        for measured in list(self._apps.values()):
            self._announce(measured, table)

    def _announce(self, measured: MeasuredApp, table: Table) -> None:
        found: Iterable[Any] = getattr(measured.app(), "routes", ())
        try:
            for template in routes.templates(found):
                table.announce(template)
            for template in routes.templates(found, websocket=True):
                table.websocket(template)
        except Exception as error:  # an app with routes of another kind is measured all the same
            self.guard.failed(error)

    def _look_for_telemetry(self, measured: MeasuredApp) -> None:
        measured.stand_aside = measured.telemetry_dormant(self._settings.keep_fastapi_telemetry, self.owns_tracing)

    def _look_at(self, measured: MeasuredApp, table: Table) -> None:
        """Find out what is to be known of one app, whose routes often come after ``init``. Never raises."""
        try:
            self._announce(measured, table)
            self._look_for_telemetry(measured)
        except Exception as error:
            self.guard.failed(error)

    def measure(self, original: Call, *, may_return: bool = False) -> Call:
        """Return a ``__call__`` that measures the outermost call of an app in ``_apps``, and passes on all others.

        ``may_return`` says that what ``original`` returns matters: those of FastAPI and Starlette return None.
        """
        apps = self._apps
        make_exchange = exchange_class(self._settings)
        trusts_header = self._settings.trust_request_start
        guard = self.guard

        async def __call__(app: Any, scope: Any, receive: Any, send: Any) -> Any:  # noqa: N807
            # A coroutine function, because servers ask whether it is one.
            measured = apps.get(id(app))
            if measured is None or SCOPE_KEY in scope:
                return await original(app, scope, receive, send)
            table = measured.table
            if table is None or not measured.running() or scope["type"] != "http":
                table = self._table_for(measured, scope)
                if table is None:
                    return await self._serve_other(measured, original, app, scope, receive, send)
            if measured.stand_aside:
                scope[_TELEMETRY_KEY] = None
            ledger = scope[SCOPE_KEY] = Ledger(METHODS.get(scope["method"], OTHER), None, app)
            if trusts_header or ledger.started < holds.until:
                arrival.note(ledger, scope, receive, trusts_header)
            exchange = make_exchange(table, guard, ledger, scope, receive, send)
            token = current.set(ledger)
            try:
                served = original(app, scope, exchange.receive, exchange.send)
                if may_return or type(served) is not CoroutineType:
                    return await DrivenOther(served, ledger)
                # The first step is run here: most requests have no other, and the driver's machinery costs more. Not by
                # `send`: it tells that the coroutine has returned by an exception, which costs as much as the rest.
                ledger.stepping = True
                try:
                    awaited = next(served.__await__(), _RETURNED)
                finally:
                    ledger.stepping = False
                    now = perf_counter()
                    if not ledger.finished:
                        ledger.charge_step(now)
                    if now - ledger.started >= SHORT:
                        note_step(ledger.started, now, ledger)
                if awaited is not _RETURNED:
                    return await Begun(served, ledger, awaited)
            except BaseException as error:
                exchange.exit(error)
                raise
            finally:
                if (context := ledger.context) is not None:
                    ledger.context = None  # it holds all that the request's context does, and ledgers may be kept
                    try:
                        context.var.reset(context)
                    except ValueError:
                        pass
                try:
                    current.reset(token)
                except ValueError:
                    pass  # a coroutine that is thrown away is closed in another context
                if not exchange.recorded:
                    exchange.exit(None)

        __call__.__wrapped__ = original  # type: ignore[attr-defined]
        return __call__

    def _table_for(self, measured: MeasuredApp, scope: Any) -> Table | None:
        """Return the table to count a request in; None for what is not to be counted as one.

        Notes in ``measured`` when the next requests need not ask.
        """
        kind = scope["type"]
        if not self._served:
            self._first_serve(kind)
        if self._loop is not (loop := running_loop()):
            self._enter_loop(loop)
        table = self._table
        if measured.new and table is not None:
            self._look_at(measured, table)
            measured.new = kind == "lifespan"  # where routes are added too
        if table is None or kind != "http" or (self._excludes and self._is_excluded(scope)):
            return None
        if self._served and loop is not None and self._loop is loop and not self._excludes:
            measured.running, measured.table = loop.is_running, table
            if self._table is not table:  # another thread has bound the probe anew meanwhile, or closed it
                measured.table = None
        return table

    def _ask_again(self) -> None:
        """Have the next request of each app look at what has changed: to be called after that."""
        for measured in list(self._apps.values()):
            measured.table = None

    async def _serve_other(
        self, measured: MeasuredApp, original: Call, app: Any, scope: Any, receive: Any, send: Any
    ) -> Any:
        """Serve a lifespan, a WebSocket, an excluded path, or anything while the probe is off."""
        kind = scope["type"]
        if kind != "lifespan" and self._table is not None:
            scope[SCOPE_KEY] = None
            if measured.stand_aside:
                scope[_TELEMETRY_KEY] = None
            if kind == "websocket" and not self._is_excluded(scope):
                return await self._converse(self._table, original, app, scope, receive, send)
        try:
            return await original(app, scope, receive, send)
        finally:
            if kind == "lifespan" and self._on_lifespan_end is not None:
                self._guarded(self._on_lifespan_end)

    async def _converse(self, table: Table, original: Call, app: Any, scope: Any, receive: Any, send: Any) -> Any:
        ledger = scope[SCOPE_KEY] = Ledger()
        ledger.finished = True  # a WebSocket has no duration to split; hooks still learn the route
        conversation = Conversation(table, self.guard, ledger, receive, send)
        token = current.set(ledger)
        try:
            result = await original(app, scope, conversation.receive, conversation.send)
        except BaseException as error:
            conversation.exit(error)
            raise
        else:
            conversation.exit(None)
            return result
        finally:
            try:
                current.reset(token)
            except ValueError:
                pass  # closed in another context, which has a request of its own

    def _is_excluded(self, scope: Any) -> bool:
        if self._names(scope.get("path", "")):
            return True
        # Servers that are told a root path put it before the path; routes, and people, know the rest.
        return bool(scope.get("root_path")) and self._names(get_route_path(scope))

    def _names(self, path: str) -> bool:
        return path in self._excluded or (bool(self._excluded_prefixes) and path.startswith(self._excluded_prefixes))

    def _first_serve(self, kind: str) -> None:
        with self._lock:
            if self._served:
                return
            self._served = kind != "lifespan"
        if self._on_first_serve is not None:
            self._guarded(self._on_first_serve, kind)

    def _enter_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Go on with another loop, unless the one before still runs: then several threads have one each."""
        before = self._loop
        if loop is None or (before is not None and before.is_running()):
            return
        self._loop = loop
        self._ask_again()
        if self._table is not None:
            self._guarded(self._tasks.attach, loop)
        if self._on_new_loop is not None:
            self._guarded(self._on_new_loop, loop)

    def _guarded(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            self.guard.failed(error)

    def _wrap_class(self, cls: type[Any]) -> None:
        if cls not in self._put_on:
            original: Call = cls.__call__
            wrapper = self.measure(original)
            cls.__call__ = wrapper
            self._put_on[cls] = (original, wrapper)

    def _unwrap_classes(self) -> None:
        for cls, (original, wrapper) in self._put_on.items():
            if cls.__call__ is wrapper:  # else somebody wrapped ours: it stays below, and does nothing
                cls.__call__ = original
        self._put_on.clear()


class Wrapper:
    """A measured ASGI callable that is no FastAPI or Starlette app."""

    def __init__(self, app: ASGIApp, probe: RequestProbe) -> None:
        self._app = app
        self._call = probe.measure(lambda _, scope, receive, send: app(scope, receive, send), may_return=True)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Serve one scope."""
        return await self._call(self, scope, receive, send)

    def __getattr__(self, name: str) -> Any:
        if name == "_app":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self._app, name)
