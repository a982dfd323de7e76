"""Requests beside the plain GET of a route: other methods, root paths, hosts, files, redirects, exclusions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.settings import load
from tests.support.measured import DURATION, Measured, eventually, uvicorn_serving


async def plain(request: Request) -> Response:
    """Answer."""
    return PlainTextResponse("ok")


def counted(measured: Measured) -> set[tuple[str, str, str]]:
    """Return method, status and route of what was counted."""
    return {labels[1:] for labels in measured.nonzero(DURATION + "_count")}


async def test_head_options_and_unknown_methods(measure: Callable[..., Measured]) -> None:
    """Each method counts by its name and the route whose path matched; those that there are not share one value."""
    app = FastAPI()
    app.add_route("/starlette/{x}", plain)
    app.add_api_route("/fastapi/{x}", lambda x: x)
    app.add_api_route("/own/{x}", lambda x: x, methods=["OPTIONS", "HEAD"])
    measured = measure(app)
    async with measured.client() as client:
        for method in ("HEAD", "OPTIONS", "BREW", "get"):
            for path in ("/starlette/1", "/fastapi/1", "/own/1"):
                await client.send(httpx.Request(method, f"http://test{path}"))
    assert counted(measured) == {
        ("HEAD", "200", "/starlette/{x}"),
        ("OPTIONS", "405", "/starlette/{x}"),
        ("_OTHER", "405", "/starlette/{x}"),
        ("GET", "200", "/starlette/{x}"),  # httpx writes it in capitals
        ("HEAD", "405", "/fastapi/{x}"),
        ("OPTIONS", "405", "/fastapi/{x}"),
        ("_OTHER", "405", "/fastapi/{x}"),
        ("GET", "200", "/fastapi/{x}"),
        ("HEAD", "200", "/own/{x}"),
        ("OPTIONS", "200", "/own/{x}"),
        ("_OTHER", "405", "/own/{x}"),
        ("GET", "405", "/own/{x}"),
    }


async def test_a_preflight_is_told_from_an_options_request(measure: Callable[..., Measured]) -> None:
    """A CORS preflight shares one value, allowed or refused; OPTIONS without its header reaches the route."""
    app = FastAPI()
    app.add_api_route("/items/{x}", lambda x: x)
    app.add_middleware(CORSMiddleware, allow_origins=["http://a.test"])
    measured = measure(app)
    async with measured.client() as client:
        for origin in ("http://a.test", "http://evil.test"):
            headers = {"origin": origin, "access-control-request-method": "GET"}
            await client.options("/items/1", headers=headers)
        await client.options("/items/1", headers={"origin": "http://a.test"})
        await client.options("/nothing")
    assert counted(measured) == {
        ("OPTIONS", "200", "_preflight"),
        ("OPTIONS", "400", "_preflight"),
        ("OPTIONS", "405", "/items/{x}"),
        ("OPTIONS", "404", "_unmatched"),
    }


async def test_a_404_of_the_handler_is_the_routes(measure: Callable[..., Measured]) -> None:
    """What a handler does not find belongs to its route; what no route matches is unmatched, in mounts too."""
    app, sub = FastAPI(), FastAPI()

    @sub.get("/orders/{order}")
    async def order(order: str) -> None:
        raise HTTPException(404)

    app.mount("/shops/{shop}", sub)
    measured = measure(app)
    for path in ("/shops/1/orders/2", "/shops/1/nothing", "/nothing"):
        assert (await measured.get(path)).status_code == 404
    assert measured.nonzero("headroom_requests_total") == {
        ("/shops/{shop}/orders/{order}", "client_error"): 1,
        ("_unmatched", "client_error"): 2,
    }


async def test_redirects_of_the_router_and_of_handlers(measure: Callable[..., Measured]) -> None:
    """A slash too many or too few is a redirect, also inside a mount; one that a handler sends is its route's."""
    app, sub = FastAPI(), FastAPI()
    sub.add_api_route("/leaf/", lambda: "ok")
    app.mount("/sub", sub)
    app.add_api_route("/items", lambda: "ok")
    app.add_api_route("/old/{x}", lambda x: RedirectResponse("/items"))
    measured = measure(app)
    for path in ("/items/", "/sub/leaf", "/sub", "/old/1"):
        assert (await measured.get(path)).status_code == 307, path
    assert counted(measured) == {("GET", "307", "_redirect"), ("GET", "307", "/old/{x}")}


@pytest.mark.parametrize(
    ("by_app", "by_server", "asked"),
    [("/api", "", "/api"), ("/api", "", ""), ("", "/api/v7", ""), ("/api", "/api", "")],
    ids=["app", "app-behind-a-proxy-that-strips", "server", "both"],
)
def test_a_root_path_is_no_part_of_the_template(
    measure: Callable[..., Measured], by_app: str, by_server: str, asked: str
) -> None:
    """Templates are the app's own, whether a root path comes from the app or from uvicorn, mounts included."""
    app, sub = FastAPI(root_path=by_app), FastAPI()
    app.add_api_route("/items/{x}", lambda x: x)
    sub.add_api_route("/leaf/{x}", lambda x: x)
    app.mount("/sub/{tenant}", sub)
    excluded = f"{asked}/items/health,{asked}/sub/t/leaf/h*"
    measured = measure(app, excluded_paths=excluded)
    paths = {"/items/1": "/items/{x}", "/items/health": ""}
    if asked or by_server:  # else Starlette finds no mount: it takes the path to begin with the root path
        paths |= {"/sub/t/leaf/1": "/sub/{tenant}/leaf/{x}", "/sub/t/leaf/healthz": ""}
    with uvicorn_serving(app, root_path=by_server) as port:
        for path in paths:
            assert httpx.get(f"http://127.0.0.1:{port}{asked}{path}").status_code == 200
        expected = {(route, "ok"): 1 for route in paths.values() if route}
        eventually(lambda: measured.nonzero("headroom_requests_total") == expected)


async def test_hosts_and_nested_routers(measure: Callable[..., Measured]) -> None:
    """Routes behind Host routing, and a bare Router, keep their templates."""
    inner = Router([Route("/by-host/{x}", plain)])
    mounted = Router([Route("/leaf/{x}", plain)])
    app = Starlette(routes=[Host("{name}.test", inner), Mount("/m/{y}", mounted), Route("/{x}", plain)])
    measured = measure(app)
    async with measured.client() as client:
        await client.get("http://a.test/by-host/1")
        await client.get("http://other/m/1/leaf/2")
        await client.get("http://other/9")
    assert measured.nonzero("headroom_requests_total") == {
        ("/by-host/{x}", "ok"): 1,
        ("/m/{y}/leaf/{x}", "ok"): 1,
        ("/{x}", "ok"): 1,
    }


async def test_static_files_share_one_template(measure: Callable[..., Measured], tmp_path: Path) -> None:
    """Found, not modified, a directory's redirect, its index, and missing: never the name of a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("<p>")
    app = FastAPI()
    app.mount("/static", StaticFiles(directory=tmp_path, html=True))
    measured = measure(app)
    async with measured.client() as client:
        response = await client.get("/static/folder/")
        await client.get("/static/folder/", headers={"if-none-match": response.headers["etag"]})
        await client.get("/static/folder")
        await client.get("/static/%2e%2e/%2e%2e/etc/passwd")
        await client.head("/static/folder/index.html")
        await client.post("/static/folder/index.html")
    assert counted(measured) == {
        ("GET", "200", "/static/{path}"),
        ("GET", "304", "/static/{path}"),
        ("GET", "307", "/static/{path}"),
        ("GET", "404", "/static/{path}"),
        ("HEAD", "200", "/static/{path}"),
        ("POST", "405", "/static/{path}"),
    }


async def test_exclusions_reach_into_routers_and_mounts(measure: Callable[..., Measured]) -> None:
    """Exact paths and prefixes name what clients ask for, whatever router or mount serves it; nothing else matches."""
    app, sub, router = FastAPI(), FastAPI(), APIRouter(prefix="/v1")
    sub.add_api_route("/healthz", lambda: "ok")
    router.add_api_route("/ready/{x}", lambda x: x)
    app.include_router(router)
    app.mount("/sub", sub)
    app.add_api_route("/sub2/{x}", lambda x: x)
    measured = measure(app, excluded_paths=("/sub/healthz", "/v1/ready*", "/missing"))
    for path in ("/sub/healthz", "/v1/ready/1", "/v1/ready", "/missing"):
        await measured.get(path)
    assert measured.nonzero("headroom_requests_total") == {}
    assert measured.nonzero("http_server_active_requests") == {}
    for path in ("/sub/healthz/", "/sub2/healthz", "/missing/x", "/SUB/healthz"):
        await measured.get(path)
    assert sum(measured.nonzero("headroom_requests_total").values()) == 4


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("healthz", "paths start with /"),
        ("^/healthz$", "paths start with /"),
        ("/a, */b", "paths start with /"),
        ("/a/*/b", "only a prefix can be excluded"),
        ("/a**", "only a prefix can be excluded"),
    ],
)
def test_an_exclusion_that_could_never_match_is_refused(value: str, reason: str) -> None:
    """What is no path, or has a star elsewhere, is told so, and does not silently measure what was to be left out."""
    with pytest.raises(SettingsError, match=reason):
        load({}, excluded_paths=value)
