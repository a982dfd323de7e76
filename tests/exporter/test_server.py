"""The HTTP server: its routes, and bad company."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from fastapi_headroom import catalog
from fastapi_headroom.errors import HeadroomError, PortInUseError
from fastapi_headroom.exporter import handler
from fastapi_headroom.exporter.collect import Collector
from fastapi_headroom.exporter.scrape import Scraper, StoppedError
from fastapi_headroom.exporter.server import MAX_CONNECTIONS, MetricsServer
from fastapi_headroom.exporter.service import Exporter
from fastapi_headroom.settings import load
from fastapi_headroom.store.reader import Reader, Snapshot
from fastapi_headroom.store.writer import Writer
from tests.exporter.support import eventually, get, half_open
from tests.support.descriptors import store_descriptors


class CountingReader(Reader):
    """A reader that counts its reads, and takes as long as it is told."""

    reads = 0
    seconds = 0.0
    error: Exception | None = None

    def read(self) -> Snapshot:
        self.reads += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return super().read()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[CountingReader]:
    """A reader of a store with one live worker."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.REQUESTS, "/orders/{id}", "ok").inc(3)
    yield CountingReader(tmp_path)
    writer.close()


@pytest.fixture
def server(reader: CountingReader, tmp_path: Path) -> Iterator[MetricsServer]:
    """A server of that store on a free port."""
    running = MetricsServer("127.0.0.1", 0, Scraper(Collector(reader)), tmp_path)
    running.start()
    yield running
    running.stop()


def threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_metrics_are_served_as_text(server: MetricsServer) -> None:
    """/metrics is Prometheus text 0.0.4 unless something else is asked for."""
    response = get(server.port)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'headroom_requests_total{http_route="/orders/{id}",outcome="ok"} 3.0\n' in response.text


def test_metrics_are_served_as_openmetrics_and_compressed(server: MetricsServer) -> None:
    """What a Prometheus asks for it gets: OpenMetrics, gzip."""
    response = get(server.port, Accept="application/openmetrics-text;version=1.0.0", Accept_Encoding="gzip")
    assert response.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert response.headers["Content-Encoding"] == "gzip"
    families = {family.name for family in parse_openmetrics(gzip.decompress(response.body).decode())}
    assert "headroom_requests" in families


def test_health_tells_the_directory_and_who_lives(server: MetricsServer, tmp_path: Path) -> None:
    """/healthz is one line of JSON with directory, live slots and the last scrape."""
    before = get(server.port, "/healthz")
    assert (before.status, before.json["last_scrape"]) == (200, None)
    get(server.port)
    after = get(server.port, "/healthz")
    assert after.json["directory"] == str(tmp_path)
    assert after.json["slots_alive"] == [0]
    assert abs(after.json["last_scrape"] - time.time()) < 10
    assert after.text.count("\n") == 1


def test_the_page_links_what_there_is_and_the_rest_is_not_found(server: MetricsServer) -> None:
    """/ links the routes, anything else is 404, and nothing but GET and HEAD is allowed."""
    page = get(server.port, "/")
    assert (page.status, 'href="/metrics"' in page.text, 'href="/healthz"' in page.text) == (200, True, True)
    assert get(server.port, "/metrics/more").status == 404
    assert get(server.port, "/metrics?name=x").status == 200
    assert get(server.port, "/metrics", method="POST").status == 405


def test_head_has_the_headers_and_no_body(server: MetricsServer) -> None:
    """HEAD answers as GET does, without the body, and the connection goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    for method in ("HEAD", "GET", "HEAD"):
        connection.request(method, "/metrics")
        response = connection.getresponse()
        body = response.read()
        assert int(response.headers["Content-Length"]) > 100
        assert bool(body) is (method == "GET")
        assert not response.will_close
    connection.close()


def test_a_scrape_that_fails_is_a_500_and_the_next_one_works(
    server: MetricsServer, reader: CountingReader, caplog: pytest.LogCaptureFixture
) -> None:
    """An error while collecting is answered as such, is over with its cause, and is logged once for as long."""
    for times in (1, 2):
        reader.error = RuntimeError("the fault")
        for _ in range(3):
            response = get(server.port)
            assert response.status == 500
            assert "the fault" not in response.text
        assert caplog.text.count("RuntimeError: the fault") == times
        reader.error = None
        assert get(server.port).status == 200


@pytest.mark.alone
def test_parallel_scrapes_share_a_read(server: MetricsServer, reader: CountingReader) -> None:
    """Twenty scrapes at once read the store two or three times, and all get a whole body."""
    reader.seconds = 0.1
    with ThreadPoolExecutor(20) as pool:
        bodies = list(pool.map(lambda _: get(server.port).body, range(20)))
    assert all(b"headroom_requests_total{" in body for body in bodies)
    assert reader.reads <= 4


def test_a_scrape_is_never_older_than_its_request(server: MetricsServer, tmp_path: Path) -> None:
    """What was written before a scrape began is in it."""
    writer = Writer.open(tmp_path)
    counter = writer.counter(catalog.REQUESTS, "/fresh", "ok")
    for count in range(1, 6):
        counter.inc()
        assert f'http_route="/fresh",outcome="ok"}} {float(count)}\n' in get(server.port).text
    writer.close()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\n", b"431"),
        (b"GET /metrics HTTP/1.1\r\nX-A: " + b"b" * 100_000 + b"\r\n\r\n", b"431"),
        (b"GET /metrics HTTP/9.9\r\n\r\n", b"505"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", b"400"),
    ],
    ids=["huge request line", "ten thousand headers", "huge header", "unknown version", "tls"],
)
def test_a_bad_request_is_refused(server: MetricsServer, request_bytes: bytes, status: bytes) -> None:
    """A request that is too large or no HTTP gets an error status at most, and scrapes go on."""
    with half_open(server.port) as connection:
        try:
            connection.sendall(request_bytes)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""  # the server closed before all of it was sent
        assert not answer or answer.split()[1] == status
    assert get(server.port).status == 200
    eventually(lambda: threads() == 0, "the end of the connections")


@pytest.mark.alone
def test_half_open_connections_do_not_keep_a_scraper_out(server: MetricsServer) -> None:
    """With ten times more silent connections than there is room for, a scrape answers at once; threads are bounded."""
    silent = [half_open(server.port, b"GET /metr" if i % 2 else b"") for i in range(10 * MAX_CONNECTIONS)]
    began = time.monotonic()
    assert get(server.port).status == 200
    assert time.monotonic() - began < 1.0
    eventually(lambda: threads() <= MAX_CONNECTIONS, "the bound on threads")
    for connection in silent:
        connection.close()
    eventually(lambda: threads() == 0, "the end of the connections")


def test_a_request_that_never_ends_is_ended(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then is cut off after the time that a request may take."""
    monkeypatch.setattr(handler, "REQUEST_SECONDS", 0.4)
    with half_open(server.port, b"GET /metrics HTTP/1.1\r\n") as connection:
        connection.settimeout(0.1)
        began = time.monotonic()
        ended = False
        while not ended and time.monotonic() - began < 30:
            try:
                connection.sendall(b"X")
                ended = connection.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
        assert ended


def test_a_client_that_does_not_read_is_dropped(reader: CountingReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that nobody takes ends with the write's time-out, and holds up no other scrape."""
    monkeypatch.setattr(handler, "REQUEST_SECONDS", 1.5)
    scraper = Scraper(Collector(reader))
    monkeypatch.setattr(scraper, "scrape", lambda **_: b"x" * 50_000_000)
    big = MetricsServer("127.0.0.1", 0, scraper, Path("/"))
    big.start()
    with half_open(big.port, b"GET /metrics HTTP/1.1\r\n\r\n"):
        eventually(lambda: threads() == 1, "the connection")
        assert get(big.port, "/healthz").status == 200
        eventually(lambda: threads() == 0, "the end of the connection")
    big.stop()


def test_stopping_frees_the_port_and_ends_connections(server: MetricsServer, reader: CountingReader) -> None:
    """After stop() another server can listen at once, though clients kept their connections alive."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    port = server.port
    server.stop()
    server.stop()
    again = MetricsServer("127.0.0.1", port, Scraper(Collector(reader)), Path("/"))
    again.stop()
    eventually(lambda: threads() == 0, "the end of the connection")
    connection.close()


def test_a_scrape_that_waits_while_the_exporter_ends_opens_nothing(reader: CountingReader, tmp_path: Path) -> None:
    """Each handover to a sidecar would leave the descriptors of a whole store behind in the worker else."""
    before = store_descriptors(tmp_path)
    exporter = Exporter(load({}, directory=tmp_path, port=0))
    exporter.start()
    assert get(urlsplit(exporter.url).port or 0).status == 200
    scraper = exporter._scraper
    exporter.stop()
    with pytest.raises(StoppedError):
        scraper.scrape()
    eventually(lambda: store_descriptors(tmp_path) == before, "the end of all connections")


def test_a_taken_port_names_the_remedy(server: MetricsServer, reader: CountingReader) -> None:
    """The error carries the address and what to set."""
    with pytest.raises(PortInUseError, match=rf"127\.0\.0\.1:{server.port} is in use.*HEADROOM_PORT or --port"):
        MetricsServer("127.0.0.1", server.port, Scraper(Collector(reader)), Path("/"))


def test_an_address_of_another_machine_names_the_remedy(reader: CountingReader) -> None:
    """An address that this machine has not is refused with the setting to change."""
    with pytest.raises(HeadroomError, match=r"cannot listen on 192\.0\.2\.1:0 .*HEADROOM_HOST or --host"):
        MetricsServer("192.0.2.1", 0, Scraper(Collector(reader)), Path("/"))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_it_listens_on_ipv6(reader: CountingReader) -> None:
    """An IPv6 address works and is written as a URL."""
    try:
        running = MetricsServer("::1", 0, Scraper(Collector(reader)), Path("/"))
    except HeadroomError:
        pytest.skip("no IPv6 loopback here")
    running.start()
    assert running.url == f"http://[::1]:{running.port}/metrics"
    with socket.create_connection(("::1", running.port), timeout=5) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    running.stop()


@pytest.mark.alone
def test_two_hundred_scrapes_at_once(server: MetricsServer, reader: CountingReader) -> None:
    """Of 200 scrapers that connect in the same moment each gets a whole body, and the store is read a few times."""
    reader.seconds = 0.05
    began = time.monotonic()
    with ThreadPoolExecutor(200) as pool:
        gate = threading.Barrier(200)

        def scrape(_: int) -> bytes:
            gate.wait(10)
            return get(server.port, timeout=20.0).body

        bodies = list(pool.map(scrape, range(200)))
    assert all(b"headroom_requests_total{" in body for body in bodies)
    assert reader.reads <= 40
    assert time.monotonic() - began < 10
    eventually(lambda: threads() == 0, "the end of the connections")
