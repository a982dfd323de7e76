"""Whether this process traces, and with what.

Traces are on when a tracer provider is configured, by the user's code or an agent, and then that one is used
and never replaced; or when the standard ``OTEL_*`` variables ask for export by OTLP, and then a provider is made
that does so over HTTP. Otherwise nothing is set up, and nothing of OpenTelemetry's SDK is imported.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from fastapi_headroom.errors import HeadroomError, MissingExtraError, SettingsError
from fastapi_headroom.settings import Settings, otlp_protocol, otlp_requested
from fastapi_headroom.tracing import spans

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from fastapi_headroom.tracing.apps import TracedApp
    from fastapi_headroom.tracing.engines import EngineTracing

log = logging.getLogger("fastapi_headroom")
FLUSH_TIMEOUT = 2.0
"""Seconds to wait for the last spans to be exported."""


class Tracing:
    """The traces of one process."""

    def __init__(self, settings: Settings) -> None:
        """Prepare. When export is asked for, import what it needs now, and not during the first request."""
        self._settings = settings
        self._provider: TracerProvider | None = None
        self._owned = False
        self._failed = False
        self._apps: weakref.WeakSet[TracedApp] = weakref.WeakSet()
        # Each lives as long as its app, whose methods it has replaced.
        self._engines: EngineTracing | None = None
        if settings.tracing and otlp_requested():
            try:
                _import_exporter()
            except HeadroomError:
                pass  # said by start()

    def start(self, *apps: Any) -> bool:
        """Trace these apps and all SQLAlchemy engines if traces are asked for; return whether they are.

        To be called when the process serves: an exporter's thread does not survive a fork. Idempotent, and
        cheap while there is nothing to do: call it again for an app that came later, or when the user's code
        may have configured a provider since, as many do in a lifespan. Never raises.
        """
        if self._failed or not self._settings.tracing:
            return False
        try:
            if self._provider is None:
                provider = configured_provider()
                if provider is None and otlp_requested():
                    provider = _make_provider(self._settings)
                    self._owned = True
                if provider is None:
                    return False
                self._provider = provider
                spans.activate(provider)
            self._trace_engines(self._provider)
            self._trace_apps(self._provider, apps)
        except HeadroomError as error:
            self._failed = True
            log.warning("fastapi-headroom: traces are off: %s", error)
        except Exception:
            self._failed = True
            log.exception("fastapi-headroom: traces are off, they could not be set up; the app is not affected")
        if self._failed:
            self.stop()
        return not self._failed

    def stop(self) -> None:
        """Take all instrumentation off and send the last spans. The provider stays: it cannot be taken back."""
        spans.deactivate()
        try:
            while self._apps:
                self._apps.pop().undo()
            if self._engines is not None:
                self._engines.close()
        except Exception:
            log.exception("fastapi-headroom: the instrumentation for traces could not be taken off")
        self._engines = None
        self.flush()
        self._provider = None

    def flush(self) -> None:
        """Send the spans that wait for export, for FLUSH_TIMEOUT at most; a provider of the user's is left alone.

        To be called when the app's lifespan ends: uvicorn then kills its process by the signal that it caught,
        so the SDK's own last export, at interpreter exit, does not happen.
        """
        if self._owned and self._provider is not None:
            # On a thread, because the exporter's own retries take longer than an app may take to stop.
            thread = threading.Thread(target=_quietly_flush, args=(self._provider,), name="headroom-flush", daemon=True)
            thread.start()
            thread.join(FLUSH_TIMEOUT)

    def _trace_engines(self, provider: TracerProvider) -> None:
        if self._engines is None and "sqlalchemy" in sys.modules:
            from fastapi_headroom.tracing.engines import EngineTracing

            self._engines = EngineTracing(provider)

    def _trace_apps(self, provider: TracerProvider, apps: tuple[Any, ...]) -> None:
        from fastapi_headroom.tracing.apps import TracedApp, can_be_traced, excluded_urls

        excluded = excluded_urls(self._settings.excluded_paths)
        for app in apps:
            if can_be_traced(app, self._settings.keep_fastapi_telemetry):
                self._apps.add(TracedApp(app, provider, excluded))


def configured_provider() -> TracerProvider | None:
    """Return the global tracer provider if somebody has configured a real one."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider) else provider


def _import_exporter() -> tuple[Any, Any, Any, Any]:
    """Import what exports by OTLP over HTTP. Raises MissingExtraError without the extra ``otlp``."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otlp", "Exporting traces by OTLP") from error
    import opentelemetry.instrumentation.fastapi  # noqa: F401 - imported ahead of the first request
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return OTLPSpanExporter, Resource, TracerProvider, BatchSpanProcessor


def _make_provider(settings: Settings) -> TracerProvider:
    """Make the provider that exports as the ``OTEL_*`` variables say, and make it the global one."""
    from opentelemetry import trace

    protocol = otlp_protocol()
    if protocol != "http/protobuf":
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL asks for {protocol!r}, and only http/protobuf is set up here: "
            "choose that, or configure a tracer provider of your own, which is then used"
        )
    exporter, resource_class, provider_class, processor = _import_exporter()
    resource = resource_class.create()
    if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        named = {"service.name": settings.service_name or "app"}
        if settings.service_version:
            named["service.version"] = settings.service_version
        resource = resource.merge(resource_class(named))
    provider: TracerProvider = provider_class(resource=resource)
    provider.add_span_processor(processor(exporter()))  # type: ignore[attr-defined]
    trace.set_tracer_provider(provider)
    return provider


def _quietly_flush(provider: Any) -> None:
    try:
        provider.force_flush()
    except Exception:  # at shutdown, on a thread of its own: there is nobody to tell but the log
        log.warning("fastapi-headroom: the last spans could not be exported", exc_info=True)
