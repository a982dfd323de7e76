"""Exemplars, from a request's span in one of several workers to a real Prometheus."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo_app.stack.process import free_port, wait_until
from demo_app.stack.servers import Prometheus
from fastapi_headroom import catalog
from tests.support.scrape import scrape_until
from tests.support.serving import serve
from tests.tracing.receiver import Receiver

APP = "tests.support.app:app"
DURATION = "http_server_request_duration_seconds"


def ask(prometheus: Prometheus, path: str, **parameters: str) -> Any:
    url = f"{prometheus.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.loads(response.read())["data"]


def write_config(path: Path, port: int, **extra: Any) -> Path:
    """Write a configuration with one target that is scraped twice a second."""
    scrape = {
        "job_name": "app",
        "scrape_interval": "500ms",
        "scrape_timeout": "500ms",
        "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
    }
    path.write_text(yaml.safe_dump({"scrape_configs": [scrape | extra]}))
    return path


def test_examples_of_two_workers_reach_prometheus(tmp_path: Path) -> None:
    """A slow request and an error, served by either of two workers, are traces that /api/v1/query_exemplars names."""
    port = free_port()
    with Receiver() as receiver:
        env = {
            "HEADROOM_PORT": str(port),
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        config = write_config(tmp_path / "prometheus.yml", port)
        with serve("gunicorn", APP, workers=2, env=env) as server, Prometheus(tmp_path / "data", config) as prometheus:
            workers: set[str] = set()

            def both_have_slept() -> bool:
                workers.add(server.get("/ping"))
                server.get("/sleep?seconds=0.12")
                return len(workers) == 2

            wait_until(both_have_slept, 60, "both workers")
            with pytest.raises(urllib.error.HTTPError):
                server.get("/error")

            def found() -> list[dict[str, Any]]:
                data = ask(prometheus, "query_exemplars", query=f"{DURATION}_bucket", start="0", end="9999999999")
                return [
                    {"series": series["seriesLabels"], **exemplar}
                    for series in data
                    for exemplar in series["exemplars"]
                ]

            wait_until(
                lambda: {"/sleep", "/error"} <= {it["series"]["http_route"] for it in found()}, 60, "the exemplars"
            )
            slow = [it for it in found() if it["series"]["http_route"] == "/sleep"]
            (error,) = [it for it in found() if it["series"]["http_route"] == "/error"]
            wait_until(lambda: any(s.name == "GET /error" for s in receiver.spans), 60, "the spans")
    traces = {span.trace: span for span in receiver.spans if span.kind == "SERVER"}
    for example in slow:  # a busy machine stretches a sleep, and puts it into another bucket
        value = float(example["value"])
        assert value >= 0.12
        above = [bound for bound in catalog.REQUEST_DURATION.buckets if value <= bound]
        assert float(example["series"]["le"]) == (above[0] if above else math.inf)
    for example, name in ((slow[-1], "GET /sleep"), (error, "GET /error")):
        assert traces[example["labels"]["trace_id"]].name == name


@pytest.mark.parametrize("sampler", ["always_off", "none"])
def test_a_request_that_is_not_sampled_writes_nothing(sampler: str) -> None:
    """Without traces, and for requests that the sampler left out, there is not even a file."""
    port = free_port()
    env = {"HEADROOM_PORT": str(port)}
    if sampler != "none":
        env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_SAMPLER": sampler}
    with serve("uvicorn", APP, env=env) as server:
        for _ in range(5):
            server.get("/ping")
        scrape_until(f"http://127.0.0.1:{port}", lambda s: s.total(f"{DURATION}_count", http_route="/ping") == 5)
        assert list(server.directory.glob("*.db"))
        assert list(server.directory.glob("exemplars*")) == []
