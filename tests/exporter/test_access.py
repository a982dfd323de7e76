"""Bearer token and TLS: who may scrape, and what is said when the files are not what they should be."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo_app.stack.process import accepts, free_port
from demo_app.stack.servers import Prometheus
from fastapi_headroom import catalog, settings
from fastapi_headroom.errors import HeadroomError
from fastapi_headroom.exporter.access import Access
from fastapi_headroom.exporter.server import MAX_CONNECTIONS
from fastapi_headroom.exporter.service import Exporter
from fastapi_headroom.store.writer import Writer
from tests.exporter.certificates import Pair, make_pair
from tests.exporter.support import eventually, get, half_open, sidecar, worker
from tests.support.serving import serve

TOKEN = "7f3c-a secret-of-the-scrapers"
Start = Callable[..., Exporter]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A certificate and its key."""
    return make_pair(tmp_path)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with a token and a line break, as editors leave it."""
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an exporter of a store with one worker; ended with the test."""
    writer = Writer.open(tmp_path / "store")
    writer.counter(catalog.REQUESTS, "/orders/{id}", "ok").inc(3)
    exporters: list[Exporter] = []

    def run(**arguments: Any) -> Exporter:
        exporters.append(Exporter(settings.load({}, directory=tmp_path / "store", port=0, **arguments)))
        exporters[-1].start()
        return exporters[-1]

    yield run
    for exporter in exporters:
        exporter.stop()
    writer.close()


def port_of(exporter: Exporter) -> int:
    port = urllib.parse.urlsplit(exporter.url).port
    assert port is not None
    return port


def get_over_tls(exporter: Exporter, pair: Pair, **headers: str) -> tuple[int, str]:
    """Ask an exporter once, trusting that certificate alone."""
    return ask(port_of(exporter), pair, **headers)


def ask(port: int, pair: Pair, **headers: str) -> tuple[int, str]:
    """Ask whoever listens there for metrics, trusting that certificate alone."""
    context = ssl.create_default_context(cafile=str(pair.certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_a_token_is_asked_for(start: Start, token_file: Path) -> None:
    """The right token gets the metrics; none, a wrong one, a part of it or another scheme gets 401 and no number."""
    port = port_of(start(exporter_token_file=token_file))
    assert "headroom_requests_total" in get(port, Authorization=f"Bearer {TOKEN}").text
    assert get(port, Authorization=f"bearer  {TOKEN} ").status == 200
    for header in (
        "",
        TOKEN,
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        "\xe9",
    ):
        response = get(port, Authorization=header)
        assert response.status == 401, header
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="fastapi-headroom"'
        assert "headroom_" not in response.text
    assert get(port, "/").status == 401


def test_health_says_no_more_than_ok_to_strangers(start: Start, token_file: Path) -> None:
    """A probe that cannot have a token learns that the exporter lives, and no path."""
    port = port_of(start(exporter_token_file=token_file))
    assert get(port, "/healthz").json == {"status": "ok"}
    assert get(port, "/healthz", Authorization=f"Bearer {TOKEN}").json["slots_alive"] == [0]


def test_a_token_is_replaced_while_it_serves(start: Start, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new token counts from the next request on, the old one no more; without the file nobody may scrape."""
    port = port_of(start(exporter_token_file=token_file))
    other = token_file.with_name("other")
    other.write_text("another")
    other.rename(token_file)
    assert get(port, Authorization=f"Bearer {TOKEN}").status == 401
    assert get(port, Authorization="Bearer another").status == 200
    token_file.unlink()
    assert get(port, Authorization="Bearer another").status == 401
    for _ in range(3):
        get(port, Authorization="Bearer a stranger's")
    # Once: strangers could fill the disk with it else.
    assert caplog.text.count(f"nobody may scrape: the token file {token_file} cannot be read") == 1
    token_file.write_text("third")
    assert get(port, Authorization="Bearer third").status == 200
    token_file.unlink()
    assert get(port, Authorization="Bearer third").status == 401
    assert caplog.text.count("nobody may scrape") == 2


def test_it_speaks_tls(start: Start, pair: Pair) -> None:
    """With a certificate the address is https, that certificate is shown, and plain HTTP gets nothing."""
    exporter = start(exporter_certificate_file=pair.certificate, exporter_key_file=pair.key)
    assert exporter.url.startswith("https://127.0.0.1:")
    status, body = get_over_tls(exporter, pair)
    assert (status, 'headroom_requests_total{http_route="/orders/{id}",outcome="ok"} 3.0' in body) == (200, True)
    with pytest.raises((http.client.HTTPException, OSError)):
        get(port_of(exporter))
    assert get_over_tls(exporter, pair)[0] == 200


def test_one_file_may_hold_both(start: Start, pair: Pair, tmp_path: Path) -> None:
    """Without a key file the key is looked for beside the certificate, in its file."""
    both = tmp_path / "both.pem"
    both.write_text(pair.certificate.read_text() + pair.key.read_text())
    assert get_over_tls(start(exporter_certificate_file=both), pair)[0] == 200


def test_a_certificate_is_replaced_while_it_serves(
    start: Start, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewed certificate is in use within seconds; one without its key is named once and the old one stays."""
    exporter = start(exporter_certificate_file=pair.certificate, exporter_key_file=pair.key)
    renewed = make_pair(tmp_path, "renewed")
    trusted = Pair(tmp_path / "trusted.crt", renewed.key)
    trusted.certificate.write_text(renewed.certificate.read_text())
    before = Pair(tmp_path / "before.crt", pair.key)
    before.certificate.write_text(pair.certificate.read_text())

    def works(with_pair: Pair) -> bool:
        try:
            return get_over_tls(exporter, with_pair)[0] == 200
        except ssl.SSLError:
            return False

    renewed.certificate.rename(pair.certificate)
    eventually(lambda: "stays in use" in caplog.text, "the complaint about half of a pair")
    assert works(before)
    assert not works(trusted)
    renewed.key.rename(pair.key)
    eventually(lambda: works(trusted), "the renewed certificate")
    assert caplog.text.count("stays in use") == 1


@pytest.mark.alone
def test_silent_connections_do_not_keep_a_scraper_out_over_tls(start: Start, pair: Pair) -> None:
    """Connections that never shake hands, or stop in the middle of it, take no thread for good."""
    exporter = start(exporter_certificate_file=pair.certificate, exporter_key_file=pair.key)
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    silent = [half_open(port_of(exporter), hello if i % 2 else b"") for i in range(4 * MAX_CONNECTIONS)]
    began = time.monotonic()
    assert get_over_tls(exporter, pair)[0] == 200
    assert time.monotonic() - began < 1.0
    for connection in silent:
        connection.close()


def test_two_hundred_scrapes_at_once_over_tls(start: Start, pair: Pair, token_file: Path) -> None:
    """A crowd is answered, each with the whole body."""
    exporter = start(
        exporter_certificate_file=pair.certificate, exporter_key_file=pair.key, exporter_token_file=token_file
    )
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        answers = list(pool.map(lambda _: get_over_tls(exporter, pair, Authorization=f"Bearer {TOKEN}"), range(200)))
    assert {status for status, _ in answers} == {200}
    assert all("headroom_requests_total{" in body for _, body in answers)


def spoil(what: str, folder: Path) -> dict[str, Path]:
    """Return settings whose files have one fault."""
    pair = make_pair(folder)
    files = {"exporter_certificate_file": pair.certificate, "exporter_key_file": pair.key}
    token = folder / "token"
    match what:
        case "missing certificate":
            pair.certificate.unlink()
        case "missing key":
            pair.key.unlink()
        case "no key in the certificate's file":
            del files["exporter_key_file"]
        case "key without certificate":
            del files["exporter_certificate_file"]
        case "other key":
            files["exporter_key_file"] = make_pair(folder, "other").key
        case "encrypted key":
            locked = make_pair(folder, "locked", password="secret")
            files = {"exporter_certificate_file": locked.certificate, "exporter_key_file": locked.key}
        case "no PEM":
            pair.certificate.write_text("-----BEGIN CERT")
        case "empty token":
            token.write_text(" \n")
            files = {"exporter_token_file": token}
        case "missing token":
            files = {"exporter_token_file": token}
        case "token is a directory":
            files = {"exporter_token_file": folder}
        case "huge token":
            token.write_text("x" * 5000)
            files = {"exporter_token_file": token}
    return files


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing certificate", r"TLS: .*tls\.crt does not exist: .*CERTIFICATE_FILE"),
        ("missing key", r"TLS: .*tls\.key does not exist: .*KEY_FILE"),
        ("no key in the certificate's file", r"TLS: .*tls\.crt and .*tls\.crt cannot be used .*KEY_FILE"),
        ("key without certificate", r"the key .*tls\.key has no certificate: set HEADROOM_EXPORTER_CERTIFICATE_FILE"),
        ("other key", r"TLS: .*cannot be used \(KEY_VALUES_MISMATCH\)"),
        ("encrypted key", r"TLS: .*cannot be used .*unencrypted key"),
        ("no PEM", r"TLS: .*cannot be used"),
        ("empty token", r"token file .* is empty: write one line"),
        ("missing token", r"token file .* cannot be read \(No such file or directory\).*--token-file"),
        ("token is a directory", r"token file .* cannot be read \(Is a directory\)"),
        ("huge token", r"token file .* is longer than 4096 bytes"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, what: str, said: str) -> None:
    """Each fault is one sentence with the file and the remedy, and nothing is served without protection."""
    with pytest.raises(HeadroomError, match=said):
        Access(settings.load({}, **spoil(what, tmp_path)))


def test_the_sidecar_refuses_to_start_unprotected(tmp_path: Path) -> None:
    """A sidecar whose token file is missing ends with status 2 and one line, and does not listen."""
    port = free_port()
    arguments = ("--dir", str(tmp_path), "--port", str(port), "--token-file", str(tmp_path / "none"))
    with sidecar(*arguments) as child:
        assert child.wait() == 2
        (line,) = child.log().splitlines()
    assert line.startswith(f"headroom sidecar: the token file {tmp_path / 'none'} cannot be read")
    assert not accepts(port)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_a_token_in_clear_text_is_warned_of(
    token_file: Path, caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    """A token without TLS on an address that others reach is said in the log."""
    with caplog.at_level(logging.WARNING):
        Access(settings.load({}, exporter_token_file=token_file, host=host))
    assert ("in clear text" in caplog.text) is warned


def test_prometheus_scrapes_with_token_and_tls(tmp_path: Path, pair: Pair, token_file: Path) -> None:
    """A real Prometheus with the documented configuration is up; without the token it is told 401."""
    port = free_port()
    common = {
        "scheme": "https",
        "scrape_interval": "500ms",
        "scrape_timeout": "500ms",
        "tls_config": {"ca_file": str(pair.certificate)},
        "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
    }
    credentials = {"authorization": {"credentials_file": str(token_file)}}
    config = tmp_path / "prometheus.yml"
    jobs = [{"job_name": "app"} | common | credentials, {"job_name": "stranger"} | common]
    config.write_text(yaml.safe_dump({"scrape_configs": jobs}))
    options = ("--dir", str(tmp_path / "store"), "--port", str(port), "--token-file", str(token_file), *pair.options)
    with (
        worker(tmp_path / "store"),
        sidecar(*options) as child,
        Prometheus(tmp_path / "data", config) as prometheus,
    ):

        def targets() -> dict[str, Any]:
            with urllib.request.urlopen(f"{prometheus.url}/api/v1/targets", timeout=30) as response:
                active = json.loads(response.read())["data"]["activeTargets"]
            return {target["labels"]["job"]: target for target in active}

        def settled() -> bool:
            seen = targets()
            return len(seen) == 2 and seen["app"]["health"] == "up" and "401" in seen["stranger"]["lastError"]

        eventually(settled, "both scrapes", 60)
        with urllib.request.urlopen(
            f"{prometheus.url}/api/v1/query?query=headroom_requests_total", timeout=30
        ) as response:
            (series,) = json.loads(response.read())["data"]["result"]
        assert (series["metric"]["job"], series["value"][1]) == ("app", "3")
        assert f"metrics at https://127.0.0.1:{port}/metrics" in child.log()
        assert TOKEN not in child.log()


def test_an_elected_worker_asks_for_them_too(tmp_path: Path, pair: Pair, token_file: Path) -> None:
    """Without a sidecar the worker that exports speaks TLS and wants the token, as the variables say."""
    port = free_port()
    env = {
        "HEADROOM_PORT": str(port),
        "HEADROOM_EXPORTER_TOKEN_FILE": str(token_file),
        "HEADROOM_EXPORTER_CERTIFICATE_FILE": str(pair.certificate),
        "HEADROOM_EXPORTER_KEY_FILE": str(pair.key),
    }
    with serve("uvicorn", "tests.support.app:app", env=env) as server:
        server.get("/ping")
        eventually(lambda: accepts(port), "the exporter")
        assert ask(port, pair)[0] == 401
        status, body = ask(port, pair, Authorization=f"Bearer {TOKEN}")
        assert (status, 'http_route="/ping",outcome="ok"} 1.0' in body) == (200, True)
