"""An app with what a hostile client can play with: parameters, a mount, redirects, CORS, and validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from tests.support.measured import Measured


@contextmanager
def measured_app() -> Iterator[Measured]:
    """Yield the app under a request probe that writes to memory."""
    app, files = FastAPI(), FastAPI()

    @app.get("/items/{item}")
    async def item(item: int) -> int:
        return item

    @app.api_route("/slash/{word}", methods=["GET", "POST"])
    async def slash(word: str) -> str:
        return word

    @files.get("/{name:path}")
    async def file(name: str) -> int:
        return len(name)

    app.mount("/files", files)
    app.add_middleware(CORSMiddleware, allow_origins=["http://shop.example"], allow_methods=["*"])
    measured = Measured(app)
    try:
        yield measured
    finally:
        measured.probe.close()
