"""Route templates: which route serves a request, told by the routers themselves.

Class-level wraps of ``handle`` note the template in the ledger that lies in the scope. ``scope["route"].path``
would drop the prefixes of included routers and of mounts, and ``root_path`` holds raw path segments.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import fastapi.routing
from starlette import routing
from starlette._utils import get_route_path

from fastapi_headroom.ledger import SCOPE_KEY, Ledger
from fastapi_headroom.probes.base import Guard

REST = "/{path}"
"""What stands in a template for the part of a path that is left to a mounted app without routes."""

Note = Callable[[Any, Any, Ledger], None]
Handle = Callable[[Any, Any, Any, Any], Awaitable[None]]
Failed = Callable[[BaseException], None]
Wrap = Callable[[Handle, Failed], Handle]


def templates(routes: Iterable[Any], *, websocket: bool = False) -> Iterator[str]:
    """Yield the templates of an app's HTTP (or WebSocket) routes: included routers, mounts and sub-apps too."""
    return (template for template, _ in _served(routes, websocket=websocket))


def find_endpoint(app: Any, template: str, method: str) -> Any:
    """Return the endpoint that an app serves a method of a template with; None where nobody knows.

    A walk through all routes: for what happens now and then.
    """
    for found, route in _served(getattr(app, "routes", None) or ()):
        methods = getattr(route, "methods", None)
        if found == template and (not methods or method in methods):
            return getattr(route, "endpoint", None)
    return None


def _served(routes: Iterable[Any], prefix: str = "", *, websocket: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the templates, and what serves each."""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is not None:
            for context in contexts():
                # `original_route` is a placeholder for everything but APIRoute, whose context has the whole template.
                source = context.starlette_route
                if source is None:
                    if not websocket and context.path_format:
                        yield prefix + context.path_format, context.original_route
                else:
                    yield from _served((source,), prefix, websocket=websocket)
        elif isinstance(route, routing.Mount):
            inner = prefix + route.path_format.removesuffix(REST)
            if route.routes:
                yield from _served(route.routes, inner, websocket=websocket)
            elif not websocket:
                yield inner + REST, route
        elif isinstance(route, routing.Host):
            yield from _served(route.routes, prefix, websocket=websocket)
        elif isinstance(route, routing.WebSocketRoute if websocket else routing.Route):
            yield prefix + route.path_format, route


def _note_mount(mount: Any, scope: Any, ledger: Ledger) -> None:
    ledger.prefix += mount.path_format.removesuffix(REST)
    if not mount.routes:
        ledger.route = ledger.prefix + REST


def _note_frontend(group: Any, scope: Any, ledger: Ledger) -> None:
    # Static files served by router.frontend(): the path is a literal prefix, and then a file's name.
    inner = scope["fastapi"]["frontend_path"]
    ledger.route = ledger.prefix + get_route_path(scope).removesuffix(inner).rstrip("/") + REST


class _Hooks:
    """The wraps, put on once however many probes ask for them, and off with the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guards: list[Guard] = []
        self._put_on: list[tuple[type[Any], Handle, Handle]] = []

    def attach(self, guard: Guard) -> None:
        with self._lock:
            if guard in self._guards:
                return
            self._guards.append(guard)
            if not self._put_on:
                for cls, wrap in _WRAPS:
                    # FastAPI before include contexts inherits Route.handle, which is wrapped already
                    if cls is not None and "handle" in vars(cls):
                        original = cls.handle
                        cls.handle = wrapper = wrap(original, self._failed)
                        wrapper.__wrapped__ = original  # type: ignore[attr-defined]
                        self._put_on.append((cls, original, wrapper))

    def detach(self, guard: Guard) -> None:
        with self._lock:
            if guard in self._guards:
                self._guards.remove(guard)
            if not self._guards:
                for cls, original, wrapper in self._put_on:
                    if cls.handle is wrapper:  # else somebody wrapped ours: it stays below, and does nothing
                        cls.handle = original
                self._put_on.clear()

    def _failed(self, error: BaseException) -> None:
        for guard in self._guards:
            guard.failed(error)


# Not coroutine functions but ones that return the coroutine: no frame of ours stays on the stack. Every request passes
# through the first two, so they are written out.
def _wrap_api_route(original: Handle, failed: Failed) -> Handle:
    def handle(route: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        ledger = scope.get(SCOPE_KEY)
        if ledger is not None:
            try:
                # One APIRoute may be included several times under different prefixes: the scope knows under which
                # it matched.
                state = scope.get("fastapi")
                context = state.get("effective_route_context") if state else None
                if context is not None and context.original_route is route:
                    ledger.route = ledger.prefix + context.path_format
                else:
                    ledger.route = ledger.prefix + route.path_format
            except Exception as error:
                failed(error)
        return original(route, scope, receive, send)

    return handle


def _wrap_route(original: Handle, failed: Failed) -> Handle:
    def handle(route: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        ledger = scope.get(SCOPE_KEY)
        if ledger is not None and not ledger.route:  # an APIRoute has noted its own
            try:
                ledger.route = ledger.prefix + route.path_format
            except Exception as error:
                failed(error)
        return original(route, scope, receive, send)

    return handle


def _wrap_other(note: Note) -> Wrap:
    def wrap(original: Handle, failed: Failed) -> Handle:
        def handle(route: Any, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
            ledger = scope.get(SCOPE_KEY)
            if ledger is not None:
                try:
                    note(route, scope, ledger)
                except Exception as error:
                    failed(error)
            return original(route, scope, receive, send)

        return handle

    return wrap


_WRAPS: tuple[tuple[type[Any] | None, Wrap], ...] = (
    (routing.Route, _wrap_route),
    (routing.WebSocketRoute, _wrap_route),
    (routing.Mount, _wrap_other(_note_mount)),
    (fastapi.routing.APIRoute, _wrap_api_route),
    (getattr(fastapi.routing, "_FrontendRouteGroup", None), _wrap_other(_note_frontend)),
)
_hooks = _Hooks()
attach = _hooks.attach
detach = _hooks.detach
