"""The apps that are measured, each as one process under uvicorn: ``python -m benchmarks.apps VARIANT --fd N``."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

METHODS = ("GET", "POST", "PUT", "DELETE")
NO_TELEMETRY: dict[str, Any] = {"telemetry": {"tracing": False, "metrics": False, "logs": False}}


def make_app(variant: str, routes: int) -> FastAPI:
    """Make the app of a variant, with so many routes before those that are called."""
    app = FastAPI(**NO_TELEMETRY) if variant == "no telemetry" else FastAPI()
    for number in range(routes):
        app.add_api_route(f"/other/{number}/{{x}}", lambda x: x, methods=list(METHODS))

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        return {"ping": "pong"}

    @app.get("/items/{item}")
    async def items(item: int) -> dict[str, int]:
        return {"item": item}

    if "BENCH_POSTGRES" in os.environ:
        add_order(app, os.environ["BENCH_POSTGRES"], os.environ["BENCH_REDIS"], variant)
    MEASURED_BY.get(variant, lambda _: None)(app)
    return app


def add_order(app: FastAPI, postgres: str, redis_url: str, variant: str) -> None:
    """Add a route that makes one query and one cache read."""
    from redis.asyncio import Redis
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(postgres, pool_size=5, max_overflow=0)  # overflow would open and close connections
    cache = Redis.from_url(redis_url)
    statement = text("select 1")
    if variant.startswith("opentelemetry"):
        from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor

        SQLAlchemyInstrumentor().instrument(engine=engine.sync_engine, skip_dep_check=True)

    @app.get("/order")
    async def order() -> dict[str, bool]:
        async with engine.connect() as connection:
            await connection.execute(statement)
        return {"plan": await cache.get("org:7:plan") is not None}


# ---------------------------------------------------------------------- who measures
def headroom(app: Any) -> None:
    """Measure with every probe; the exporter runs too, as it does by default."""
    import fastapi_headroom

    fastapi_headroom.init(app, port=0)


def traced_headroom(share: float) -> Callable[[Any], None]:
    """Return what measures with every probe and traces that share of the requests."""

    def instrument(app: Any) -> None:
        provide_tracer(share)
        headroom(app)

    return instrument


def instrumentator(app: Any) -> None:
    """Measure with prometheus-fastapi-instrumentator as its README says."""
    from prometheus_fastapi_instrumentator import Instrumentator

    Instrumentator().instrument(app)


def starlette_exporter(app: Any) -> None:
    """Measure with starlette_exporter as its README says."""
    from starlette_exporter import PrometheusMiddleware

    app.add_middleware(PrometheusMiddleware)


def opentelemetry(share: float) -> Callable[[Any], None]:
    """Return what instruments an app with OpenTelemetry's own FastAPI instrumentation, spans only."""

    def instrument(app: Any) -> None:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        provide_tracer(share)
        FastAPIInstrumentor.instrument_app(app)

    return instrument


def provide_tracer(share: float) -> None:
    """Configure the SDK as an application does, with an exporter that throws the spans away."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share))
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    trace.set_tracer_provider(provider)


MEASURED_BY: dict[str, Callable[[Any], None]] = {
    "headroom": headroom,
    "headroom, tracing 1 %": traced_headroom(0.01),
    "headroom, tracing 0 %": traced_headroom(0.0),
    "instrumentator": instrumentator,
    "starlette_exporter": starlette_exporter,
    "opentelemetry 1 %": opentelemetry(0.01),
    "opentelemetry 100 %": opentelemetry(1.0),
}
"""How each variant that is measured gets there; all others are bare."""


def main() -> None:
    """Serve until killed."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant")
    parser.add_argument("--fd", type=int, required=True, help="a socket that listens")
    parser.add_argument("--routes", type=int, default=0)
    arguments = parser.parse_args()
    config = uvicorn.Config(
        make_app(arguments.variant, arguments.routes),
        loop="uvloop", http="httptools", log_level="warning", access_log=False, timeout_keep_alive=300,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=arguments.fd)])


if __name__ == "__main__":
    main()
