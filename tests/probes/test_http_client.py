"""Calls to other services: the histogram by host, and the stage ``http_client`` of the ledger."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from fastapi import FastAPI

from demo_app.stack.process import free_port
from fastapi_headroom.probes import http_client
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.http_client import HttpClientProbe
from fastapi_headroom.probes.threadpool import Threadpool
from tests.support.measured import Measured, best_of, busy, uvicorn_serving
from tests.support.scrape import Scrape, scrape_until
from tests.support.serving import serve

pytestmark = pytest.mark.alone

DURATION = "http_client_request_duration_seconds"
LIBRARIES = pytest.mark.parametrize("library", ["httpx", "httpx-sync", "aiohttp", "requests"])


class Service(BaseHTTPRequestHandler):
    """``/slow`` waits 100 ms with its headers, ``/body`` 500 ms with its body; ``/503`` fails, ``/hop`` redirects."""

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            time.sleep(0.1)
        self.send_response({"/503": 503, "/hop": 307}.get(self.path, 200))
        if self.path == "/hop":
            self.send_header("Location", "/")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.flush()
        if self.path == "/body":
            time.sleep(0.5)
        self.wfile.write(b"ok")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The address of a service."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def measured(measure: Callable[..., Measured]) -> Iterator[Measured]:
    """A measured app whose calls of other services and whose threads are measured, too."""
    measured = measure(FastAPI())
    probe, pool = HttpClientProbe(), Threadpool(Guard("loop"))
    probe.guard.bind(measured.writer)
    probe.bind(measured.writer)
    pool.bind(measured.writer)
    yield measured
    pool.close()
    probe.close()
    assert measured.value("headroom_probe_errors_total", probe="request") == 0, "a hook failed"


def counts(measured: Measured) -> dict[tuple[str, ...], float]:
    """Return (error type, method, status, host) -> calls."""
    return measured.nonzero(DURATION + "_count")


def fetch(port: int, path: str) -> None:
    """Call the measured app, by a client that is not measured."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
        response.read()


async def call(library: str, url: str, **options: Any) -> int:
    """Call a service by a library, read the body, and return the status."""
    if library == "httpx":
        async with httpx.AsyncClient(follow_redirects=True, verify=False) as client:
            return (await client.get(url, **options)).status_code
    if library == "aiohttp":
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            await response.text()
            return response.status
    return await asyncio.to_thread(call_synchronously, library, url)


def call_synchronously(library: str, url: str) -> int:
    """Do the same in a thread."""
    if library == "requests":
        return int(requests.get(url, timeout=5).status_code)
    return httpx.get(url, follow_redirects=True, verify=False).status_code  # a TLS context costs 50 ms and more


@LIBRARIES
def test_the_stage_and_the_histogram(measured: Measured, service: str, library: str) -> None:
    """A call of 100 ms is 95 ms or more http_client and nearly nothing of threadpool or other, on a real server."""
    app = measured.app

    @app.get("/")
    async def handler() -> int:
        return await call(library, service + "/slow?secret=1")

    @app.get("/warm")
    async def warm() -> int:
        return await call(library, service + "/")

    def timed() -> float:
        return measured.value(DURATION + "_sum", **_labels("GET", "200", "127.0.0.1"))

    served = 0

    def one_call() -> tuple[dict[str, float], float]:
        nonlocal served
        before, calls, served = measured.stages("/"), timed(), served + 1
        fetch(port, "/")
        after = measured.stages_of("/", served)
        return {stage: after[stage] - before.get(stage, 0.0) for stage in after}, timed() - calls

    def rest(stages: dict[str, float]) -> float:
        return stages.get("other", 0.0) + stages.get("threadpool", 0.0)

    with uvicorn_serving(app) as port:
        fetch(port, "/warm")
        stages, duration = best_of(
            one_call, lambda one: one[0]["http_client"] < 0.25 and rest(one[0]) < 0.09 and one[1] < 0.25
        )
    assert 0.095 <= stages["http_client"] < 0.25, stages
    assert rest(stages) < 0.09, stages
    assert 0.095 <= duration < 0.25


def _labels(method: str, status: str, host: str, error: str = "") -> dict[str, str]:
    return {
        "http_request_method": method,
        "http_response_status_code": status,
        "server_address": host,
        "error_type": error,
    }


def test_a_call_in_a_sync_endpoint(measured: Measured, service: str) -> None:
    """In a sync endpoint the 100 ms of a call are http_client, and the 100 ms of computing threadpool."""
    app = measured.app

    @app.get("/")
    def handler() -> None:
        busy(0.1)
        call_synchronously("httpx-sync", service + "/slow")

    served = 0

    def one_call() -> dict[str, float]:
        nonlocal served
        before, served = measured.stages("/"), served + 1
        fetch(port, "/")
        after = measured.stages_of("/", served)
        return {stage: after[stage] - before.get(stage, 0.0) for stage in after}

    with uvicorn_serving(app) as port:
        stages = best_of(one_call, lambda one: one["http_client"] < 0.19 and one["threadpool"] < 0.19)
    assert 0.095 <= stages["http_client"] < 0.19, stages
    assert 0.095 <= stages["threadpool"] < 0.19, stages


@LIBRARIES
async def test_the_body_is_part_of_the_stage(measured: Measured, service: str, library: str) -> None:
    """A body that is 500 ms late is waited for in http_client; all but aiohttp have it in the call's duration."""

    @measured.app.get("/")
    async def handler() -> int:
        return await call(library, service + "/body")

    await measured.get("/")
    assert measured.stages("/")["http_client"] >= 0.475
    duration = measured.value(DURATION + "_sum", **_labels("GET", "200", "127.0.0.1"))
    assert (duration >= 0.475) == (library != "aiohttp")


@LIBRARIES
async def test_failures_and_redirects(measured: Measured, service: str, library: str) -> None:
    """A 503 has its status as error type, a refused connection the exception's name; a redirect is one call."""
    assert await call(library, service + "/503") == 503
    assert await call(library, service + "/hop") == 200
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Exception, match=r".") as refused:
            await call(library, f"http://localhost:{unused.getsockname()[1]}/secret?token=1")
    assert counts(measured) == {
        ("503", "GET", "503", "127.0.0.1"): 1,
        ("", "GET", "200", "127.0.0.1"): 1,
        (refused.type.__name__, "GET", "", "localhost"): 1,
    }


async def test_a_call_that_is_cancelled_counts(measured: Measured, service: str) -> None:
    """A call that ran into asyncio's time-out counts with the time it took and leaves no wait open."""
    truth = {"called": 0.0, "slept": 0.0}

    @measured.app.get("/")
    async def handler() -> None:
        began = time.perf_counter()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.25):  # by then it has been sent on any machine
                await call("httpx", service + "/body")
        truth["called"] = time.perf_counter() - began
        await asyncio.sleep(0.05)
        truth["slept"] = time.perf_counter() - began - truth["called"]

    await measured.get("/")
    assert counts(measured) == {("CancelledError", "GET", "", "127.0.0.1"): 1}
    assert 0.1 < measured.stages("/")["http_client"] <= truth["called"]
    assert measured.stages("/")["other"] >= truth["slept"] - 0.005


async def test_a_stream_ends_with_its_headers(measured: Measured, service: str) -> None:
    """A streamed response of httpx is timed until its headers: how long it is read is the reader's affair."""
    async with httpx.AsyncClient() as client, client.stream("GET", service + "/body") as response:
        await response.aread()
    assert measured.value(DURATION + "_sum", **_labels("GET", "200", "127.0.0.1")) < 0.4  # the body takes 0.5


def test_labels_are_bounded(measured: Measured, service: str) -> None:
    """Past the cap hosts are _OTHER, an invented method is _OTHER, and user information is in no label."""
    port = service.rpartition(":")[2]
    for n in range(http_client.MAX_HOSTS + 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", _always_here)
            httpx.get(f"http://user:password@host-{n}.test:{port}/path-{n}?key={n}")
    httpx.request("BREW", f"http://127.0.0.1:{port}/")
    found = counts(measured)
    assert {host for *_, host in found if host != "_OTHER"} == {f"host-{n}.test" for n in range(http_client.MAX_HOSTS)}
    assert found["", "GET", "200", "_OTHER"] == 5
    assert found["501", "_OTHER", "501", "_OTHER"] == 1
    text = str(list(measured.writer.samples()))
    assert not any(word in text for word in ("password", "user:", "path-", port, "BREW"))


def _always_here(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


async def test_apps_of_this_process_are_no_other_service(measured: Measured) -> None:
    """Clients of httpx with a transport to an app or a mock count nothing."""

    @measured.app.get("/")
    async def handler() -> None:
        pass

    await measured.get("/")
    mock = httpx.MockTransport(lambda request: httpx.Response(200))
    async with httpx.AsyncClient(transport=mock) as client:
        await client.get("http://example.org/")
    assert counts(measured) == {}


def test_clients_are_put_back(measured: Measured) -> None:
    """After close every client has its very own methods again, and a client made before works on, uncounted."""
    classes = (httpx.AsyncClient, httpx.Client, aiohttp.ClientSession, aiohttp.ClientResponse, requests.Session)
    names = ("send", "send", "_request", "read", "send")
    wrapped = [vars(cls)[name] for cls, name in zip(classes, names, strict=True)]
    probe = HttpClientProbe()
    probe.bind(measured.writer)
    probe.close()
    assert [vars(cls)[name] for cls, name in zip(classes, names, strict=True)] == wrapped
    assert all(hasattr(function, "__wrapped__") for function in wrapped)


def test_init_is_all_it_takes(service: str) -> None:
    """With nothing but init, the calls of a client that a handler imports are in the scrape and in the ledger."""
    port = free_port()
    with serve("uvicorn", "tests.support.app:app", env={"HEADROOM_PORT": str(port)}) as server:

        def called(seen: Scrape) -> bool:
            server.get(f"/outside?url={service}/slow")
            return seen.total(DURATION + "_count", server_address="127.0.0.1") >= 2

        seen = scrape_until(f"http://127.0.0.1:{port}", called)
        calls = seen.total(DURATION + "_count", server_address="127.0.0.1")
        assert seen.total(DURATION + "_sum", server_address="127.0.0.1") >= calls * 0.095
        assert seen.total("headroom_request_stage_seconds_total", stage="http_client") >= 0.095


def test_libraries_imported_later_are_measured() -> None:
    """What is imported after the start is wrapped at the next sample, and nothing is imported by us."""
    program = """
import sys
from fastapi_headroom.probes.http_client import HttpClientProbe
from fastapi_headroom.store.writer import Writer
assert not {"httpx", "aiohttp", "requests"} & set(sys.modules)
probe = HttpClientProbe()
probe.bind(Writer.in_memory())
assert not {"httpx", "aiohttp", "requests"} & set(sys.modules)
import aiohttp, httpx
before = httpx.Client.send, httpx.AsyncClient.send, aiohttp.ClientSession._request
probe.sample()
after = httpx.Client.send, httpx.AsyncClient.send, aiohttp.ClientSession._request
assert all(old is not new for old, new in zip(before, after))
probe.close()
assert before == (httpx.Client.send, httpx.AsyncClient.send, aiohttp.ClientSession._request)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
