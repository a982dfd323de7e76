"""The route of a request is the template that the router matched, never a path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi.routing
import httpx
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette import routing
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from fastapi_headroom import settings
from fastapi_headroom.probes.request import RequestProbe
from fastapi_headroom.probes.routes import templates
from fastapi_headroom.store.writer import Writer


async def plain(request: Request) -> Response:
    """Answer."""
    return PlainTextResponse("ok")


class Page:
    """An endpoint that is an ASGI class."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.call = PlainTextResponse("page")(scope, receive, send)

    def __await__(self) -> Any:
        return self.call.__await__()


def make_app(folder: Path) -> FastAPI:
    """Make an app with routes of every kind."""
    app = FastAPI()

    @app.get("/")
    @app.get("/plain")
    async def root() -> str:
        return "ok"

    @app.get("/items/{item_id:int}")
    async def item(item_id: int) -> int:
        return item_id

    @app.get("/sync/{name}")
    def sync(name: str) -> str:
        return name

    inner = APIRouter(prefix="/{team}/users")

    @inner.get("/{user}")
    async def user(team: str, user: str) -> str:
        return user

    @inner.websocket("/{user}/live")
    async def live(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    inner.add_route("/raw/{x}", plain)
    outer = APIRouter(prefix="/v1")
    outer.include_router(inner, prefix="/teams")
    app.include_router(outer)
    app.include_router(inner, prefix="/v2")
    app.add_route("/starlette/{x}", plain, methods=["GET", "POST"])
    app.router.routes.append(routing.Route("/page/{x}", Page))

    sub = FastAPI()

    @sub.get("/orders/{order}")
    async def order(order: str) -> str:
        return order

    subsub = Starlette(routes=[routing.Route("/leaf/{x}", plain)])
    sub.mount("/deep", subsub)
    app.mount("/tenants/{tenant}", sub)
    (folder / "file.txt").write_text("static")
    app.mount("/static", StaticFiles(directory=folder))
    app.router.routes.append(routing.Mount("/grouped", routes=[routing.Route("/{x}/y", plain)]))
    return app


CASES = [
    ("/", "/"),
    ("/plain", "/plain"),
    ("/items/7", "/items/{item_id}"),
    ("/sync/a", "/sync/{name}"),
    ("/v1/teams/red/users/ann", "/v1/teams/{team}/users/{user}"),
    ("/v2/red/users/ann", "/v2/{team}/users/{user}"),
    ("/v2/raw/1", "/v2/raw/{x}"),
    ("/starlette/1", "/starlette/{x}"),
    ("/page/1", "/page/{x}"),
    ("/tenants/t1/orders/9", "/tenants/{tenant}/orders/{order}"),
    ("/tenants/t1/deep/leaf/9", "/tenants/{tenant}/deep/leaf/{x}"),
    ("/grouped/1/y", "/grouped/{x}/y"),
    ("/static/file.txt", "/static/{path}"),
    ("/static/none.txt", "/static/{path}"),
    ("/tenants/t1/nothing", "_unmatched"),
    ("/nothing", "_unmatched"),
    ("/v1/teams/red/users/ann/", "_redirect"),
    ("/openapi.json", "/openapi.json"),
    ("/docs", "/docs"),
]


@pytest.fixture
def probe() -> Iterator[RequestProbe]:
    """A probe that is closed afterwards."""
    probe = RequestProbe(settings.load({}))
    yield probe
    probe.close()


def routes_of(writer: Writer) -> dict[str, float]:
    """Return the requests by route."""
    found: dict[str, float] = {}
    for (name, labels), value in writer.samples().items():
        if name == "headroom_requests_total" and value:
            route = dict(labels)["http_route"]
            found[route] = found.get(route, 0.0) + value
    return found


@pytest.mark.parametrize("middleware", [False, True], ids=["bare", "behind-middleware"])
async def test_the_template_is_the_whole_way_to_the_route(
    probe: RequestProbe, tmp_path: Path, middleware: bool
) -> None:
    """Prefixes of included routers and of mounts are in the template, and no raw path is."""
    app = make_app(tmp_path)
    if middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    probe.instrument(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path, expected in CASES:
            writer = Writer.in_memory()
            probe.bind(writer)
            await client.get(path)
            assert routes_of(writer) == {expected: 1.0}, path


async def test_a_wrong_method_keeps_the_template(probe: RequestProbe, tmp_path: Path) -> None:
    """A 405 belongs to the route whose path matched."""
    app = make_app(tmp_path)
    probe.instrument(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path, expected in (
            ("/items/7", "/items/{item_id}"),
            ("/v2/red/users/ann", "/v2/{team}/users/{user}"),
            ("/tenants/t1/orders/9", "/tenants/{tenant}/orders/{order}"),
        ):
            writer = Writer.in_memory()
            probe.bind(writer)
            assert (await client.delete(path)).status_code == 405
            assert routes_of(writer) == {expected: 1.0}


def test_a_websocket_has_its_template(probe: RequestProbe, tmp_path: Path) -> None:
    """WebSocket routes of included routers are known by template too."""
    app = make_app(tmp_path)
    writer = Writer.in_memory()
    probe.instrument(app)
    probe.bind(writer)
    with TestClient(app).websocket_connect("/v2/red/users/ann/live"):
        pass
    route = "/v2/{team}/users/{user}/live"
    assert writer.value("headroom_stream_lifetime_seconds_count", http_route=route, kind="websocket") == 1.0


def test_all_routes_are_found_before_a_request_comes(tmp_path: Path) -> None:
    """The walk over an app yields the very templates that requests get."""
    app = make_app(tmp_path)
    expected = {route for _, route in CASES if not route.startswith("_")}
    found = set(templates(app.routes))
    assert expected <= found
    assert not any(template.endswith("/live") for template in found)
    assert "/v1/teams/{team}/users/{user}/live" in set(templates(app.routes, websocket=True))


@pytest.mark.skipif(not hasattr(APIRouter, "frontend"), reason="this FastAPI serves no frontends")
async def test_files_of_a_frontend_share_one_template(probe: RequestProbe, tmp_path: Path) -> None:
    """The file names below router.frontend() are folded."""
    (tmp_path / "index.html").write_text("<p>")
    (tmp_path / "app.js").write_text("1")
    router = APIRouter()
    router.frontend("/ui", directory=tmp_path)
    app = FastAPI()
    app.include_router(router, prefix="/site")
    writer = Writer.in_memory()
    probe.instrument(app)
    probe.bind(writer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/site/ui/app.js")).status_code == 200
        assert (await client.get("/site/ui/index.html")).status_code == 200
    assert routes_of(writer) == {"/site/ui/{path}": 2.0}


async def test_an_app_called_by_another_does_not_take_its_route(probe: RequestProbe) -> None:
    """A request that a handler makes to a second app in the same process leaves the first one's route alone."""
    inner = FastAPI()

    @inner.get("/inner/{x}")
    async def inside(x: str) -> str:
        return x

    app = FastAPI()

    @app.get("/outer/{x}")
    async def outside(x: str) -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(inner), base_url="http://inner") as client:
            return (await client.get(f"/inner/{x}")).text

    writer = Writer.in_memory()
    probe.instrument(app)
    probe.bind(writer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/outer/1")).status_code == 200
    assert routes_of(writer) == {"/outer/{x}": 1.0}


def test_closing_puts_the_classes_back() -> None:
    """The last probe that closes restores every class; one that is still open keeps its hooks."""
    classes = (routing.Route, routing.WebSocketRoute, routing.Mount, fastapi.routing.APIRoute)
    before = [vars(cls)["handle"] for cls in classes]
    first, second = RequestProbe(settings.load({})), RequestProbe(settings.load({}))
    first.bind(Writer.in_memory())
    second.bind(Writer.in_memory())
    first.close()
    first.close()
    assert [vars(cls)["handle"] for cls in classes] != before
    second.close()
    assert [vars(cls)["handle"] for cls in classes] == before
