"""Writes the configuration files of the demo's Prometheus, Alertmanager and Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

JOB = "shop"


def write_prometheus(
    path: Path, *, target: str, alertmanager: str, rules: Path, scrape_interval: float, environment: str = "demo"
) -> Path:
    """Write Prometheus' configuration: one target, the rules of a folder, one Alertmanager."""
    interval = f"{round(scrape_interval * 1_000)}ms"
    return _write(
        path,
        {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
                "external_labels": {"environment": environment},
            },
            "rule_files": [str(rules / "*.rules.yml")],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
            "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
        },
    )


def write_alertmanager(path: Path, *, shipped: Path, inbox: str) -> Path:
    """Write the shipped configuration with all receivers replaced by the inbox, and without its patience."""
    config: dict[str, Any] = yaml.safe_load(shipped.read_text())
    _hurry(config["route"])
    webhook = {"url": inbox, "send_resolved": True}
    config["receivers"] = [{"name": it["name"], "webhook_configs": [webhook]} for it in config["receivers"]]
    return _write(path, config)


def write_grafana_provisioning(folder: Path, *, prometheus: str, dashboards: Path) -> Path:
    """Write Grafana's provisioning folder: the Prometheus of the demo, and the boards of a folder."""
    _write(
        folder / "datasources" / "prometheus.yaml",
        {
            "apiVersion": 1,
            "datasources": [
                {
                    "name": "Prometheus",
                    "uid": "prometheus",
                    "type": "prometheus",
                    "access": "proxy",
                    "url": prometheus,
                    "isDefault": True,
                    "jsonData": {"timeInterval": "1s", "httpMethod": "POST"},
                }
            ],
        },
    )
    provider = {"name": "headroom", "type": "file", "disableDeletion": True, "options": {"path": str(dashboards)}}
    _write(folder / "dashboards" / "headroom.yaml", {"apiVersion": 1, "providers": [provider]})
    return folder


def _hurry(route: dict[str, Any]) -> None:
    route |= {"group_wait": "1s", "group_interval": "5s"}
    for child in route.get("routes", []):
        _hurry(child)


def _write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
