"""Blocking calls on a loop's thread are counted by kind and site, and those that block nothing are not."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import pathlib
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
import redis
import redis.asyncio
import redis.connection
import requests
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util.queue import Queue

from demo_app.stack.process import free_port, wait_until
from demo_app.stack.servers import Postgres, Redis
from fastapi_headroom.probes import blocking
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blocking import BlockingCalls
from fastapi_headroom.probes.blocking_places import PLACES, REMEDIES
from fastapi_headroom.store.writer import Writer
from tests.probes.loops import RUNS, Run
from tests.support.measured import Measured, uvicorn_serving
from tests.support.scrape import scrape_until
from tests.support.serving import serve

pytestmark = pytest.mark.alone

CALLS = "headroom_blocking_calls_total"


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def calls(writer: Writer) -> Iterator[BlockingCalls]:
    guard = Guard("loop")
    guard.bind(writer)
    calls = BlockingCalls(guard)
    calls.bind(writer)
    yield calls
    calls.close()
    assert writer.value("headroom_probe_errors_total", probe="loop") == 0, "a hook failed"


@pytest.fixture(scope="module")
def website() -> Iterator[str]:
    """A web server on a thread that answers every request at once."""

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def counted(writer: Writer) -> dict[tuple[str, str], float]:
    """Return (kind, function) -> calls."""
    found: dict[tuple[str, str], float] = {}
    for (sample, pairs), value in writer.samples().items():
        if sample == CALLS:
            labels = dict(pairs)
            assert labels["site"].split(":")[0] == __name__, "the blame is the test's own code"
            found[labels["kind"], labels["site"].split(":")[1].rpartition(".")[2]] = value
    return found


async def on_loop(function: Callable[[], Any]) -> None:
    """Call a function on the loop's thread."""
    function()


def test_sleeping_on_the_loop(run: Run, calls: BlockingCalls, writer: Writer) -> None:
    """Each time.sleep on a loop's thread counts at the function that makes it; sleep(0) and asyncio.sleep do not."""

    async def handler() -> None:
        time.sleep(0.002)  # noqa: ASYNC251
        time.sleep(0.002)  # noqa: ASYNC251
        time.sleep(0)  # noqa: ASYNC251
        await asyncio.sleep(0.002)

    run(handler())
    assert counted(writer) == {("sleep", "handler"): 2}


def test_the_same_calls_in_a_thread_count_nothing(run: Run, calls: BlockingCalls, writer: Writer) -> None:
    """What a thread does beside the loop, and what runs without any loop, is nobody's blocking call."""

    async def main() -> None:
        await asyncio.to_thread(time.sleep, 0.002)

    run(main())
    time.sleep(0.002)
    assert counted(writer) == {}


def test_synchronous_redis(run: Run, calls: BlockingCalls, writer: Writer, redis_server: Redis) -> None:
    """A command and a pipeline of a sync client count once each, and those of redis.asyncio never."""
    client = redis.Redis.from_url(redis_server.url)
    client.ping()

    def read() -> None:
        client.get("key")

    def pipe() -> None:
        with client.pipeline() as pipeline:
            pipeline.get("a").get("b").get("c").execute()

    async def main() -> None:
        read()
        pipe()
        async with redis.asyncio.Redis.from_url(redis_server.url) as other:
            await other.get("key")
            await other.pipeline().get("a").get("b").execute()
        await asyncio.to_thread(read)

    run(main())
    client.close()
    assert counted(writer) == {("sync_redis", "read"): 1, ("sync_redis", "pipe"): 1}


def test_synchronous_database(run: Run, calls: BlockingCalls, writer: Writer, postgres: Postgres) -> None:
    """Connect, statement and commit of a sync engine count; the same of an async engine, by two drivers, never."""
    engine = create_engine(postgres.url(driver="psycopg"))

    def query() -> None:
        with engine.begin() as connection:
            connection.execute(text("select 1"))

    async def main() -> None:
        for driver in ("asyncpg", "psycopg"):
            other = create_async_engine(postgres.url(driver=driver))
            async with other.begin() as connection:
                await connection.execute(text("select pg_sleep(0.03)"))
            await other.dispose()
        assert counted(writer) == {}
        await asyncio.to_thread(query)
        assert counted(writer) == {}
        query()

    run(main())
    engine.dispose()
    assert counted(writer) == {("sync_db", "query"): 2}  # the thread's connection is used again: statement and commit


def test_waiting_for_a_sync_pool_on_the_loop(run: Run, calls: BlockingCalls, writer: Writer) -> None:
    """A checkout that waits for a sync pool on the loop's thread counts, even when it times out."""
    from sqlalchemy.pool import QueuePool

    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.03)

    def check_out() -> None:
        with contextlib.suppress(Exception), engine.connect():
            pass

    with engine.connect():
        run(on_loop(check_out))
    engine.dispose()
    assert counted(writer) == {("sync_db", "check_out"): 1}


@pytest.mark.parametrize("library", ["urllib", "http.client", "requests", "httpx"])
def test_synchronous_http(run: Run, calls: BlockingCalls, writer: Writer, website: str, library: str) -> None:
    """One call of any synchronous HTTP client on the loop's thread counts once, and none of httpx.AsyncClient."""

    def ask() -> None:
        if library == "urllib":
            urllib.request.urlopen(website).read()
        elif library == "requests":
            requests.get(website, timeout=5)
        elif library == "httpx":
            httpx.get(website)
        else:
            connection = http.client.HTTPConnection(website.split("/")[2])
            connection.request("GET", "/")
            connection.getresponse().read()
            connection.close()

    async def main() -> None:
        ask()
        async with httpx.AsyncClient() as client:
            await client.get(website)
        await asyncio.to_thread(ask)

    run(main())
    assert counted(writer) == {("sync_http", "ask"): 1}


def test_subprocesses(run: Run, calls: BlockingCalls, writer: Writer) -> None:
    """subprocess.run, Popen.wait and os.system that take 10 ms count once each; asyncio's subprocesses do not."""
    program = [sys.executable, "-c", "import time; time.sleep(0.05)"]

    def capture() -> None:
        subprocess.run(program, capture_output=True, check=True)

    def wait() -> None:
        with subprocess.Popen(program) as process:
            process.wait()

    def shell() -> None:
        os.system("sleep 0.05")

    async def main() -> None:
        for call in (capture, wait, shell):
            call()
        await (await asyncio.create_subprocess_exec(*program)).wait()

    run(main())
    assert counted(writer) == {("subprocess", "capture"): 1, ("subprocess", "wait"): 1, ("subprocess", "shell"): 1}


def test_names_that_are_slow_to_find(
    run: Run, calls: BlockingCalls, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up of an address that takes 10 ms or more counts as dns, a fast one does not, nor the loop's own."""
    calls.close()
    slow = 0.0

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:  # the resolver's answer, as late as we say
        threading.Event().wait(slow)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    calls.bind(writer)

    def resolve() -> None:
        socket.getaddrinfo("example.org", 80)

    async def main() -> None:
        nonlocal slow
        for delay in (0.0, 0.02):
            slow = delay
            for _ in range(5):
                resolve()

    run(main())
    asyncio.run(_resolve_asynchronously())
    found = counted(writer)
    assert found.keys() == {("dns", "resolve")}
    assert 5 <= found["dns", "resolve"] < 8, "only the slow ones, and what the machine disturbed"
    calls.close()


async def _resolve_asynchronously() -> None:
    await asyncio.get_running_loop().getaddrinfo("example.org", 80)


def test_slow_files(run: Run, calls: BlockingCalls, writer: Writer, tmp_path: Path) -> None:
    """A Path.read_bytes that blocks for 50 ms counts as file, one that is fast does not."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_bytes(b"fast")

    def read(path: Path) -> bytes:
        return path.read_bytes()

    async def main() -> None:
        writing = threading.Thread(target=lambda: (threading.Event().wait(0.05), pipe.write_bytes(b"slow")))
        writing.start()
        assert read(pipe) == b"slow"
        writing.join()
        for _ in range(5):
            assert read(file) == b"fast"

    run(main())
    assert counted(writer)["file", "read"] < 3, "only the slow one, and what the machine disturbed"


def test_the_site_is_the_deepest_frame_of_the_users_code(calls: BlockingCalls, writer: Writer) -> None:
    """The helper that makes the call is to blame, not the handler above it nor the library below."""

    def helper() -> None:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.02)"], check=True)

    async def handler() -> None:
        helper()

    asyncio.run(handler())
    ((_, pairs),) = [key for key in writer.samples() if key[0] == CALLS]
    line = helper.__code__.co_firstlineno
    name = "test_the_site_is_the_deepest_frame_of_the_users_code.helper"
    assert dict(pairs) == {"kind": "subprocess", "site": f"{__name__}:{name}:{line}"}


def test_what_we_do_ourselves_is_not_counted(calls: BlockingCalls, writer: Writer) -> None:
    """A call that the package itself makes, such as opening its store, is not laid at the door of whoever called it."""
    functions: dict[str, Any] = {"time": time, "__name__": "fastapi_headroom.made_up"}
    place = Path(blocking.__file__).with_name("made_up.py")
    exec(compile("def opening():\n    time.sleep(0.002)", place, "exec"), functions)
    asyncio.run(on_loop(functions["opening"]))
    assert counted(writer) == {}


def test_sites_are_bounded(calls: BlockingCalls, writer: Writer) -> None:
    """The first 50 sites have series, all later ones share ``other``."""
    code = "\n".join(f"def site_{n}():\n    time.sleep(0.0011)" for n in range(60))
    functions: dict[str, Any] = {"time": time, "__name__": "generated"}
    exec(compile(code, "/app/generated.py", "exec"), functions)

    async def main() -> None:
        for n in range(60):
            functions[f"site_{n}"]()

    asyncio.run(main())
    sites = {dict(pairs)["site"]: value for (name, pairs), value in writer.samples().items() if name == CALLS}
    assert len(sites) == 51
    assert sites["other"] == 10


def test_one_log_record_per_site_with_the_remedy(
    calls: BlockingCalls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site is logged once, with the remedy of its kind; another one within seconds waits for its next call."""
    moment = time.monotonic()
    monkeypatch.setattr(blocking.time, "monotonic", lambda: moment)

    def first() -> None:
        time.sleep(0.0011)

    def second() -> None:
        time.sleep(0.0011)

    async def main() -> None:
        nonlocal moment
        for _ in range(3):
            first()
        second()
        moment += blocking.LOG_INTERVAL
        second()
        first()

    with caplog.at_level(logging.WARNING, "fastapi_headroom"):
        asyncio.run(main())
    messages = [record.getMessage() for record in caplog.records]
    assert ["first" in messages[0], "second" in messages[1], len(messages)] == [True, True, 2]
    assert all(REMEDIES["sleep"] in message and "(sleep)" in message for message in messages)


def test_a_raised_error_passes_through_and_counts(calls: BlockingCalls, writer: Writer) -> None:
    """A call that fails raises what it raised, and counts: it blocked all the same."""

    def ask() -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            connection = http.client.HTTPConnection(*silent.getsockname(), timeout=0.02)
            connection.request("GET", "/")
            with contextlib.closing(connection):
                connection.getresponse()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            ask()

    asyncio.run(main())
    assert counted(writer) == {("sync_http", "ask"): 1}


def test_a_handler_under_a_real_server(measure: Callable[..., Measured], calls: BlockingCalls, writer: Writer) -> None:
    """Under uvicorn the sleep of an async handler counts at the handler, and that of a sync endpoint does not."""
    app = FastAPI()

    @app.get("/async")
    async def blocks() -> None:
        time.sleep(0.002)  # noqa: ASYNC251

    @app.get("/sync")
    def does_not() -> None:
        time.sleep(0.002)

    measured = measure(app)
    with uvicorn_serving(measured.app) as port:
        for path in ("async", "sync", "async"):
            httpx.get(f"http://127.0.0.1:{port}/{path}")
    assert counted(writer) == {("sleep", "blocks"): 2}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_init_is_all_it_takes(loop: str) -> None:
    """Under uvicorn with nothing but init, a sleep on the loop is in the scrape, and its remedy in the server's log."""
    port = free_port()
    app, options = "tests.support.app:app", ("--loop", loop)
    with serve("uvicorn", app, env={"HEADROOM_PORT": str(port)}, options=options) as server:
        server.get("/block?seconds=0.005")
        seen = scrape_until(f"http://127.0.0.1:{port}", lambda scrape: scrape.total(CALLS, kind="sleep") == 1)
        (site,) = seen.values(CALLS, "site")
        assert site.startswith("tests.support.app:block:")
        wait_until(lambda: REMEDIES["sleep"] in server.log(), 40, "the log record")
        assert "while serving /block" in server.log()


def test_libraries_imported_later_are_found(writer: Writer) -> None:
    """What is imported after the start is wrapped at the next sample; what was never imported is not imported by us."""
    program = """
import sys, asyncio
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.blocking import BlockingCalls
from fastapi_headroom.store.writer import Writer
gone = ("redis", "sqlalchemy", "httpcore")
assert not any(name in sys.modules for name in gone)
calls = BlockingCalls(Guard("loop"))
calls.bind(Writer.in_memory())
assert not any(name in sys.modules for name in gone)
import redis
from redis.connection import AbstractConnection as connection
before = connection.send_packed_command
calls.sample()
assert connection.send_packed_command is not before
calls.close()
assert connection.send_packed_command is before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_place_is_there_and_is_put_back(writer: Writer) -> None:
    """With these versions every place exists, is wrapped while bound, and is the very same object after close."""
    assert {httpcore, Queue, DefaultDialect, redis.connection, pathlib, shutil}  # all imported
    calls = BlockingCalls(Guard("loop"))
    before = {place.name: vars(place.owner())[place.attribute] for place in PLACES}
    calls.bind(writer)
    assert all(vars(place.owner())[place.attribute] is not before[place.name] for place in PLACES)
    calls.bind(writer)
    calls.close()
    calls.close()
    assert {place.name: vars(place.owner())[place.attribute] for place in PLACES} == before
    assert {place.kind for place in PLACES} == set(REMEDIES)
