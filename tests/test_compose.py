"""The compose stack, as far as it can be checked without a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "compose"
STACK: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
SERVE_NOTHING = {"seed", "load"}
"""Services that nobody connects to."""


@pytest.fixture(params=sorted(SERVICES))
def service(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Each service in turn."""
    return request.param, SERVICES[request.param]


def test_the_stack_is_the_demo_plus_grafana_and_tempo() -> None:
    """All parts that `make demo` starts are there, and the two that it cannot bring."""
    assert set(SERVICES) == {
        *("postgres", "redis", "cache", "cache-west", "seed", "carriers", "shop", "worker", "sidecar", "load", "inbox"),
        *("prometheus", "alertmanager", "grafana", "tempo"),
    }


def test_images_are_pinned(service: tuple[str, dict[str, Any]]) -> None:
    """Every image has a full version as its tag, also those that the Dockerfile begins with."""
    name, options = service
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", options["image"]), name
    bases = re.findall(r"^FROM (\S+)", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)
    assert bases and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)


def test_grafana_is_of_the_line_that_the_boards_are_made_for() -> None:
    """Grafana 12."""
    assert SERVICES["grafana"]["image"].startswith("grafana/grafana:12.")


def test_ports_are_on_the_loopback_address(service: tuple[str, dict[str, Any]]) -> None:
    """No service without a password is reachable from another machine."""
    _, options = service
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in options.get("ports", []))
    assert options.get("network_mode") is None


def test_nobody_is_root(service: tuple[str, dict[str, Any]]) -> None:
    """Every service names a user, and it is not root; none is privileged."""
    name, options = service
    assert str(options.get("user", "0")).split(":")[0] not in ("0", "root", ""), name
    assert not options.get("privileged")


def test_services_have_health_checks(service: tuple[str, dict[str, Any]]) -> None:
    """Whoever is connected to has a health check with a command, and whoever depends on it waits for that."""
    name, options = service
    if name not in SERVE_NOTHING:
        assert options["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    for other, condition in options.get("depends_on", {}).items():
        healthy = "service_completed_successfully" if other == "seed" else "service_healthy"
        assert condition == {"condition": healthy}, (name, other)


def test_mounted_files_exist(service: tuple[str, dict[str, Any]]) -> None:
    """What is mounted from the repository is there, and read-only; other mounts are declared volumes."""
    _, options = service
    for mount in options.get("volumes", []):
        source, _, mode = (*mount.split(":"), "")[:3]
        if source.startswith("."):
            assert (COMPOSE / source).resolve().exists(), mount
            assert mode == "ro", mount
        else:
            assert source in STACK["volumes"], mount


def test_the_image_is_built_of_files_that_exist() -> None:
    """What the Dockerfile copies exists and is let through by its ignore file."""
    allowed = (COMPOSE / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert "demo_app" in sources
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in allowed, source


def test_commands_run_modules_that_exist() -> None:
    """The shop's containers start modules and files of this repository."""
    words = " ".join(" ".join(options.get("command", [])) for options in SERVICES.values())
    for module in re.findall(r"\bdemo_app(?:\.\w+)*", words.replace("demo_app/load.py", "demo_app.load")):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module


def test_data_sources_lead_to_services() -> None:
    """Grafana's data sources name services and their ports; exemplars lead to the traces."""
    sources = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/datasources.yaml").read_text())["datasources"]
    assert {source["url"] for source in sources} == {"http://prometheus:9090", "http://tempo:3200"}
    (prometheus,) = (source for source in sources if source["type"] == "prometheus")
    exemplars = prometheus["jsonData"]["exemplarTraceIdDestinations"]
    assert [it["datasourceUid"] for it in exemplars] == [it["uid"] for it in sources if it["type"] == "tempo"]


def test_boards_are_provisioned_where_they_are_mounted() -> None:
    """The provider's folder is the one on which dashboards/ is mounted; its first board exists."""
    providers = yaml.safe_load((COMPOSE / "grafana/provisioning/dashboards/headroom.yaml").read_text())["providers"]
    (folder,) = (provider["options"]["path"] for provider in providers)
    assert f"../dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]
    first = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "dashboards" / Path(first).relative_to(folder)).exists()


def test_traces_go_where_tempo_listens() -> None:
    """The shop and its worker export to Tempo's OTLP port over HTTP."""
    receivers = yaml.safe_load((COMPOSE / "tempo/tempo.yaml").read_text())["distributor"]["receivers"]
    port = receivers["otlp"]["protocols"]["http"]["endpoint"].rsplit(":", 1)[1]
    for name in ("shop", "worker"):
        assert SERVICES[name]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://tempo:{port}"


def test_alertmanager_is_the_shipped_one_with_the_inbox() -> None:
    """Routes and inhibition are those that are shipped; only the addresses of the receivers differ."""
    shipped = (ROOT / "alerts" / "alertmanager.yml").read_text().replace("http://127.0.0.1:9095/", "http://inbox:9095/")
    assert yaml.safe_load((COMPOSE / "alertmanager/alertmanager.yml").read_text()) == yaml.safe_load(shipped)


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")
def test_alertmanager_takes_its_configuration() -> None:
    """amtool accepts the file."""
    subprocess.run(
        ["amtool", "check-config", str(COMPOSE / "alertmanager/alertmanager.yml")], check=True, capture_output=True
    )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    """promtool accepts the file together with the shipped rules, which it finds where they are mounted."""
    text = (COMPOSE / "prometheus/prometheus.yml").read_text()
    assert "../alerts:/etc/prometheus/rules:ro" in SERVICES["prometheus"]["volumes"]
    assert "/etc/prometheus/rules/" in text
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/rules/", f"{ROOT / 'alerts'}/"))
    done = subprocess.run(["promtool", "check", "config", str(config)], check=True, capture_output=True, text=True)
    assert "rules found" in done.stdout
