"""The alert rules are valid, tested, explained, and fire on nothing that the catalog does not know."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.pack import support

UIDS = {board.stem for board in support.BOARDS}


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid() -> None:
    """promtool accepts every rule file."""
    _run(support.tool("promtool"), "check", "rules", *support.RULE_FILES)


@pytest.mark.timeout(600)  # promtool takes all the time that a busy machine lets it wait for
@pytest.mark.parametrize("path", support.TEST_FILES, ids=lambda path: path.name)
def test_rules_pass_their_unit_tests(path: Path) -> None:
    """Every alert fires, stays quiet and resolves as its unit tests state."""
    _run(support.tool("promtool"), "test", "rules", path)


def test_every_alert_is_tested_both_ways() -> None:
    """Each alert has a case in which it fires and one in which it does not; each test states its interval."""
    fires: set[str] = set()
    quiet: set[str] = set()
    for path in support.TEST_FILES:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            assert test["interval"] and test["name"], path
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else quiet).add(case["alertname"])
    alerts = {rule["alert"] for rule in support.rules()}
    assert fires == alerts
    assert quiet == alerts - {"HeadroomWatchdog"}


def test_rules_name_only_the_catalog() -> None:
    """No rule reads a series that no probe writes."""
    for rule in support.rules():
        assert support.names_in(rule["expr"]) - support.metric_names() == set(), rule["alert"]


def test_every_alert_has_a_runbook_and_a_board() -> None:
    """Each alert leads to a runbook with its four parts and to a board that exists."""
    for rule in support.rules():
        notes = rule["annotations"]
        runbook = support.ROOT / notes["runbook_url"]
        assert runbook.name == f"{rule['alert']}.md"
        headings = re.findall(r"^## (.+)$", runbook.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
        assert notes["dashboard_url"].removeprefix("/d/").partition("?")[0] == rule["labels"]["board"]
        assert rule["labels"]["board"] in UIDS
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert "{{" not in notes["summary"] and notes["description"]


def test_every_runbook_belongs_to_an_alert() -> None:
    """No runbook is left over, and the queries in runbooks name only the catalog's metrics."""
    paths = sorted((support.ROOT / "alerts" / "runbooks").glob("*.md"))
    assert {path.stem for path in paths} == {rule["alert"] for rule in support.rules()}
    known = support.metric_names()
    for path in paths:
        for name in re.findall(
            r"\b(?:headroom|http_server|db_client|messaging)_[a-z_]+\b", path.read_text(encoding="utf-8")
        ):
            if not name.endswith("_"):
                assert name in known | set(_labels()), f"{path.name}: {name}"


def test_alertmanager_configuration_is_valid() -> None:
    """amtool accepts the configuration."""
    _run(support.tool("amtool"), "check-config", support.ROOT / "alerts" / "alertmanager.yml")


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (("alertname=HeadroomPoolExhausted", "severity=critical"), "pager"),
        (("alertname=HeadroomPoolWait", "severity=warning"), "tickets"),
        (("alertname=HeadroomWatchdog", "severity=info"), "watchdog"),
    ],
)
def test_alerts_are_routed_by_severity(labels: tuple[str, ...], receiver: str) -> None:
    """Critical alerts page, warnings make tickets, the watchdog has a receiver of its own."""
    config = support.ROOT / "alerts" / "alertmanager.yml"
    command = [support.tool("amtool"), "config", "routes", "test", f"--config.file={config}", *labels]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == receiver


def _labels() -> set[str]:
    from fastapi_headroom import catalog

    return {label for metric in catalog.ALL for label in metric.labels}
