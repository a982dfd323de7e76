"""What responses tell clients and proxies about keeping them, by route."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles

from fastapi_headroom.probes.cache_control import judge
from tests.support.measured import Measured, eventually, uvicorn_serving

POLICIES = "headroom_response_cache_policies_total"
SENT = "http_server_response_body_size_bytes_count"
MAX_AGE = "headroom_response_max_age_seconds_total"


def shop() -> FastAPI:
    """Return an app whose routes say all there is to say, and one that says nothing."""
    app = FastAPI()

    @app.get("/plans/{plan_id}")
    async def plan(plan_id: int, request: Request) -> Response:
        known = request.headers.get("if-none-match") == '"1"'
        headers = {"Cache-Control": "public, max-age=300", "ETag": '"1"'}
        return Response(b"" if known else str(plan_id), 304 if known else 200, headers)

    @app.api_route("/me", methods=["GET", "POST"])
    async def me(response: Response) -> str:
        response.headers["Cache-Control"] = "no-store"
        return "me"

    @app.get("/gone")
    async def gone() -> Response:
        return Response(status_code=410, headers={"Cache-Control": "max-age=60"})

    @app.get("/twice")
    async def twice() -> Response:
        response = Response("x")
        response.headers.append("Cache-Control", "max-age=60")
        response.headers.append("Cache-Control", "private")
        return response

    @app.get("/silent")
    async def silent() -> str:
        return "x"

    return app


def test_policies_are_counted_by_route_under_uvicorn(measure: Callable[..., Measured], tmp_path: Path) -> None:
    """Answers to GET and HEAD count by what their headers say, a 304 too; POST, errors and silent answers do not."""
    (tmp_path / "logo.svg").write_text("<svg/>")
    app = shop()
    app.add_middleware(GZipMiddleware)
    app.mount("/static", StaticFiles(directory=tmp_path))
    measured = measure(app)
    with uvicorn_serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for plan_id in range(3):
            client.get(f"/plans/{plan_id}")
        assert client.get("/plans/1", headers={"if-none-match": '"1"'}).status_code == 304
        client.get("/me")
        client.post("/me")
        assert client.get("/gone").status_code == 410
        client.get("/twice")
        client.get("/static/logo.svg")
        client.get("/silent")
        eventually(lambda: measured.value(SENT, http_request_method="GET", http_route="/silent") == 1)
    assert measured.nonzero(POLICIES) == {
        ("/plans/{plan_id}", "public"): 4,
        ("/me", "no_store"): 1,
        ("/twice", "private"): 1,
    }
    assert measured.nonzero(MAX_AGE) == {("/plans/{plan_id}",): 4 * 300, ("/twice",): 60}


async def test_values_made_by_each_response_make_no_more_series(measure: Callable[..., Measured]) -> None:
    """A lifetime that differs in every response adds up in the one series of its route."""
    app = FastAPI()

    @app.get("/clock/{second}")
    async def clock(second: int) -> Response:
        return Response("x", headers={"Cache-Control": f"max-age={second}"})

    measured = measure(app)
    for second in range(1, 301):
        await measured.get(f"/clock/{second}")
    assert measured.nonzero(POLICIES) == {("/clock/{second}", "public"): 300}
    assert measured.nonzero(MAX_AGE) == {("/clock/{second}",): 300 * 301 / 2}


@pytest.mark.parametrize(
    ("said", "policy", "seconds"),
    [
        (b"public, max-age=60", "public", 60),
        (b"max-age=60", "public", 60),
        (b"Max-Age=60, S-Maxage=600", "public", 600),
        (b"private, max-age=60, s-maxage=600", "private", 60),
        (b'private="set-cookie", max-age="60"', "private", 60),
        (b"max-age=60, max-age=90", "public", 60),
        (b"no-store, max-age=60", "no_store", 0),
        (b"private, no-cache, no-store, must-revalidate", "no_store", 0),
        (b"no-cache", "revalidate", 0),
        (b"public, max-age=0, must-revalidate", "revalidate", 0),
        (b"max-age=soon", "revalidate", 0),
        (b"max-age=-1", "revalidate", 0),
        (b"public", "no_lifetime", 0),
        (b"stale-while-revalidate=30", "no_lifetime", 0),
        (b"", "no_lifetime", 0),
        (b"=,;,\xff=\xff", "no_lifetime", 0),
        (b"max-age=" + b"9" * 400, "public", 2**31),
    ],
)
def test_the_strictest_directive_is_the_policy(said: bytes, policy: str, seconds: float) -> None:
    """Every value of the header makes one of five policies, as RFC 9111 reads it."""
    assert judge(said) == (policy, seconds)
