"""An app under a request probe of its own, and what the probe wrote."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal, TypeVar

import httpx
import uvicorn

from fastapi_headroom import settings
from fastapi_headroom.probes.request import RequestProbe
from fastapi_headroom.store.writer import Writer

DURATION = "http_server_request_duration_seconds"
STAGE = "headroom_request_stage_seconds_total"
Result = TypeVar("Result")


class Measured:
    """An app under a probe of its own, and what the probe wrote."""

    def __init__(self, app: Any, **arguments: Any) -> None:
        self.writer = Writer.in_memory()
        self.served: list[str] = []
        self.probe = RequestProbe(settings.load({}, **arguments), on_first_serve=self._serve)
        self.app = self.probe.instrument(app)

    def _serve(self, kind: str) -> None:
        self.served.append(kind)
        self.probe.bind(self.writer)

    def value(self, name: str, **labels: str) -> float:
        """Return one sample, 0 when there is none."""
        try:
            return self.writer.value(name, **labels)
        except KeyError:
            return 0.0

    def nonzero(self, name: str) -> dict[tuple[str, ...], float]:
        """Return a family's samples that are not 0, by label values in the order of the names."""
        return {
            tuple(value for _, value in labels): number
            for (sample, labels), number in self.writer.samples().items()
            if sample == name and number
        }

    def stages(self, route: str) -> dict[str, float]:
        """Return a route's seconds by stage."""
        return {stage: value for (path, stage), value in self.nonzero(STAGE).items() if path == route}

    def requests(self, route: str) -> float:
        """Return how many requests of a route have a duration."""
        return sum(value for labels, value in self.nonzero(DURATION + "_count").items() if labels[3] == route)

    def stages_of(self, route: str, requests: float = 1) -> dict[str, float]:
        """Wait until so many requests have been written down, whole, by the thread of a server; return the seconds.

        By stage, which sum to the durations, but for the wait before these, ``accept_queue``.
        """

        def whole() -> bool:
            stages = sum(seconds for stage, seconds in self.stages(route).items() if stage != "accept_queue")
            return self.requests(route) >= requests and abs(stages - self.seconds(route)) < 0.001

        eventually(whole)
        return self.stages(route)

    def seconds(self, route: str) -> float:
        """Return the sum of a route's durations."""
        return sum(value for labels, value in self.nonzero(DURATION + "_sum").items() if labels[3] == route)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Call the app in process; what it raises becomes a 500 as with a server."""
        transport = httpx.ASGITransport(self._tell, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    async def _tell(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve, and print what the app raises: a test that fails by a 500 shows why."""
        try:
            await self.app(scope, receive, send)
        except Exception:
            traceback.print_exc()
            raise

    async def get(self, path: str) -> httpx.Response:
        """Call the app once in process."""
        async with self.client() as client:
            return await client.get(path)


@contextmanager
def uvicorn_serving(
    app: Any,
    loop: Literal["auto", "asyncio", "uvloop"] = "auto",
    *,
    root_path: str = "",
    http: Literal["auto", "h11", "httptools"] = "auto",
) -> Iterator[int]:
    """Serve an app by uvicorn on a thread; yield the port."""
    config = uvicorn.Config(
        app, port=0, loop=loop, http=http, root_path=root_path, log_level="critical", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def eventually(holds: Callable[[], Any], seconds: float = 40.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.005)


def best_of(measure: Callable[[], Result], right: Callable[[Result], bool], tries: int = 5) -> Result:
    """Measure until it is right, so many times at most; return the last result, for the caller to check.

    A machine that stood still for a moment spoils one measurement, code that is wrong spoils all.
    """
    for _ in range(tries):
        found = measure()
        if right(found):
            break
    return found


def compute(seconds: float) -> None:
    """Use so much CPU time on this thread, in Python code."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def busy(seconds: float) -> None:
    """Hold the thread."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
