"""The server span of an app, by OpenTelemetry's FastAPI instrumentation, put on and taken off without a trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

_BUILD = "build_middleware_stack"
_SWITCHES = frozenset({"tracing", "metrics", "logs", "operation_spans"})
"""What is on in FastAPI's telemetry when nobody configures it; all else is off, or None."""


class TracedApp:
    """One instrumented app.

    The instrumentation wraps ``build_middleware_stack``, which does nothing for an app that has built its stack,
    and building it again would make a second set of the user's middlewares. So a stack that is there is wrapped
    as it is, and taking the instrumentation off gives the same one back.
    """

    def __init__(self, app: Any, provider: TracerProvider, excluded_urls: str | None) -> None:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.metrics import NoOpMeterProvider

        from fastapi_headroom.tracing.gate import Gate, GatedProvider

        self.app = app
        self._instrumentor = FastAPIInstrumentor
        self._inner: Any = app.middleware_stack
        self._own_build: Callable[[], Any] | None = vars(app).get(_BUILD)
        build: Callable[[], Any] = app.build_middleware_stack

        def build_once() -> Any:
            if self._inner is None:
                self._inner = build()
            return self._inner

        app.build_middleware_stack = build_once
        gated = GatedProvider(provider)
        try:
            FastAPIInstrumentor.instrument_app(
                app,
                server_request_hook=_stand_aside,
                tracer_provider=gated,
                meter_provider=NoOpMeterProvider(),  # the request probe measures; twice would be waste
                excluded_urls=excluded_urls,
                exclude_spans=["receive", "send"],
            )
        except BaseException:
            self._put_build_back()
            raise
        build_traced: Callable[[], Any] = app.build_middleware_stack

        def build_gated() -> Any:
            traced = build_traced()
            # Given the stack back as it is, when it is of a kind that the instrumentation does not know.
            if gated.tracer is None or traced is self._inner:
                return traced
            return Gate(gated.tracer, traced, self._inner, app)

        app.build_middleware_stack = build_gated
        if app.middleware_stack is not None:
            app.middleware_stack = app.build_middleware_stack()

    def undo(self) -> None:
        """Take the instrumentation off."""
        self.app._original_build_middleware_stack = lambda: self._inner
        self._instrumentor.uninstrument_app(self.app)
        self._put_build_back()

    def _put_build_back(self) -> None:
        if self._own_build is None:
            vars(self.app).pop(_BUILD, None)
        else:
            setattr(self.app, _BUILD, self._own_build)


def _stand_aside(_: Any, scope: Any) -> None:
    """Keep FastAPI apps that are mounted in this one from making a server span of their own."""
    scope.setdefault("fastapi.telemetry", None)


def can_be_traced(app: Any, keep_fastapi_telemetry: bool = False) -> bool:
    """Return whether the app is FastAPI's or Starlette's and has no server span by the user's own doing.

    With ``keep_fastapi_telemetry`` FastAPI's own telemetry is that of the user, configured or not.
    """
    if not hasattr(app, _BUILD) or getattr(app, "_is_instrumented_by_opentelemetry", False):
        return False
    if any(_makes_server_spans(middleware.cls) for middleware in getattr(app, "user_middleware", ())):
        return False
    wanted = keep_fastapi_telemetry or telemetry_is_configured(app)
    return not (wanted and _reports_by_itself(app))


def _reports_by_itself(app: Any) -> bool:
    """Return whether FastAPI's own telemetry has something to report when there is a tracer provider.

    It makes the server span then, if any. All of it, metrics and logs too, falls silent beside the instrumentation.
    """
    config, native = getattr(app, "_telemetry", None), getattr(app, "_native_telemetry", None)
    return isinstance(config, dict) and native is not None and bool(config.get("tracing") or native.enabled())


def telemetry_is_configured(app: Any) -> bool:
    """Return whether the user gave ``FastAPI(telemetry=...)`` anything but what it is without that."""
    config = getattr(app, "_telemetry", None)
    if not isinstance(config, dict):
        return False
    return any(bool(value) != (name in _SWITCHES) for name, value in config.items())


def _makes_server_spans(middleware: Any) -> bool:
    """Return whether a middleware is Starlette's or OpenTelemetry's own for server spans."""
    name, module = getattr(middleware, "__name__", ""), getattr(middleware, "__module__", "")
    return name == "OpenTelemetryMiddleware" and module.startswith(("starlette.", "opentelemetry."))


def excluded_urls(paths: tuple[str, ...]) -> str | None:
    """Return the instrumentation's pattern list for paths (exact, or a prefix that ends in ``*``)."""
    patterns = [
        "^[^/]*//[^/]*" + (re.escape(path[:-1]) if path.endswith("*") else re.escape(path) + "$") for path in paths
    ]
    return ",".join(patterns) or None
