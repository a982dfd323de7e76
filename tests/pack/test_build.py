"""The generated files are what the code generates, and can be exported from wherever the package lies."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from fastapi_headroom import catalog
from fastapi_headroom.pack import build, export, panels, promql
from fastapi_headroom.pack.__main__ import main
from fastapi_headroom.pack.rules import Links
from tests.pack import support


def test_make_packs_leaves_no_difference() -> None:
    """Boards, rules and docs/metrics.md in the project are exactly what the code builds, twice the same."""
    first, second = build.render(Links()), build.render(Links())
    assert first == second
    for name, text in first.items():
        assert (support.ROOT / name).read_text(encoding="utf-8") == text, f"{name} is stale: run `make packs`"
    written = {str(path.relative_to(support.ROOT)) for path in (*support.BOARDS, *support.RULE_FILES)}
    assert written | {"docs/metrics.md"} == set(first)


def test_command_writes_the_pack_without_warnings(tmp_path: Path) -> None:
    """``python -m fastapi_headroom.pack`` writes into the folder it is given, with the addresses it is given."""
    arguments = (
        "--to",
        tmp_path,
        "--runbook-base",
        "https://wiki.example/",
        "--grafana-url",
        "https://grafana.example/",
    )
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "fastapi_headroom.pack", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rule = yaml.safe_load((tmp_path / "alerts/pool.rules.yml").read_text())["groups"][0]["rules"][0]
    assert rule["annotations"]["runbook_url"] == "https://wiki.example/HeadroomPoolWait.md"
    assert rule["annotations"]["dashboard_url"].startswith("https://grafana.example/d/headroom-pool?var-job=")


def test_check_names_what_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--check`` writes nothing, returns 0 on fresh files, and names each stale one."""
    assert main(["--to", str(tmp_path), "--check"]) == 1
    assert not list(tmp_path.iterdir())
    assert main(["--to", str(tmp_path)]) == 0
    assert main(["--to", str(tmp_path), "--check"]) == 0
    (tmp_path / "docs/metrics.md").write_text("old")
    capsys.readouterr()
    assert main(["--to", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err == "docs/metrics.md is stale: run `make packs`\n"


def test_export_copies_boards_rules_and_runbooks(tmp_path: Path) -> None:
    """Export writes what Grafana, Prometheus and Alertmanager read, unchanged, and returns the paths."""
    written = {str(path.relative_to(tmp_path)) for path in export.export(tmp_path)}
    assert {f"dashboards/{board.name}" for board in support.BOARDS} <= written
    assert {f"alerts/{path.name}" for path in support.RULE_FILES} <= written
    assert {"alerts/alertmanager.yml", "alerts/runbooks/HeadroomPoolWait.md"} <= written
    for name in written:
        assert (tmp_path / name).read_bytes() == (support.ROOT / name).read_bytes()


def test_export_puts_addresses_in_front(tmp_path: Path) -> None:
    """Exported rules lead to the reader's own runbooks and Grafana."""
    export.export(tmp_path, runbook_base="https://wiki.example/runbooks", grafana_url="https://grafana.example")
    for path in sorted((tmp_path / "alerts").glob("*.rules.yml")):
        for rule in yaml.safe_load(path.read_text())["groups"][0]["rules"]:
            assert rule["annotations"]["runbook_url"].startswith("https://wiki.example/runbooks/Headroom")
            assert rule["annotations"]["dashboard_url"].startswith("https://grafana.example/d/headroom-")


def test_export_leaves_nothing_that_is_shipped_behind(tmp_path: Path) -> None:
    """What the wheel carries is what users can have: every file of the two folders is exported."""
    written = {path.relative_to(tmp_path) for path in export.export(tmp_path)}
    folders = (support.ROOT / "dashboards", support.ROOT / "alerts")
    assert written == {p.relative_to(support.ROOT) for f in folders for p in f.rglob("*") if p.is_file()}


def test_exported_rules_pass_their_exported_tests(tmp_path: Path) -> None:
    """With addresses of one's own in front, promtool finds rules and tests in step."""
    export.export(tmp_path, runbook_base="https://wiki.example/runbooks", grafana_url="https://grafana.example")
    tests = sorted(map(str, (tmp_path / "alerts/tests").glob("pool.test.yml")))
    done = subprocess.run(
        [support.tool("promtool"), "test", "rules", *tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifests_hold_what_the_files_hold(tmp_path: Path) -> None:
    """Each PrometheusRule has its file's groups, each ConfigMap its board, letter by letter, and names are valid."""
    export.export_kubernetes(tmp_path, grafana_url="https://grafana.example")
    found = [yaml.safe_load(path.read_text()) for path in sorted(tmp_path.iterdir())]
    rules = {one["metadata"]["name"]: one for one in found if one["kind"] == "PrometheusRule"}
    boards = {one["metadata"]["name"]: one for one in found if one["kind"] == "ConfigMap"}
    assert len(rules) == len(support.RULE_FILES) and len(boards) == len(support.BOARDS)
    for path in support.RULE_FILES:
        text = path.read_text().replace("dashboard_url: /d/", "dashboard_url: https://grafana.example/d/")
        assert rules[f"headroom-{path.name.removesuffix('.rules.yml')}"]["spec"] == yaml.safe_load(text)
    for path in support.BOARDS:
        board = boards[f"{path.stem}-board"]
        assert board["data"] == {path.name: path.read_text()}
        assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in (*rules, *boards))
    assert all(len(path.read_bytes()) < 200_000 for path in tmp_path.iterdir())  # kubectl apply keeps up to 256 KiB


def test_export_finds_package_data_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package exports the files that its wheel carries."""
    package = tmp_path / "site-packages" / "fastapi_headroom" / "pack"
    shipped = package / "shipped"
    (shipped / "dashboards").mkdir(parents=True)
    (shipped / "alerts").mkdir()
    (shipped / "dashboards" / "headroom-pool.json").write_text("{}")
    monkeypatch.setattr(export, "__file__", str(package / "export.py"))
    assert export.export(tmp_path / "out") == [tmp_path / "out" / "dashboards" / "headroom-pool.json"]


def test_a_wrong_label_fails_the_build() -> None:
    """A matcher on a label that the metric does not carry cannot reach a board."""
    with pytest.raises(ValueError, match="no label for the matcher"):
        promql.series(catalog.POOL_WAIT, 'worker=~".*"', suffix="_count")
    with pytest.raises(ValueError, match="does not fit"):
        promql.series(catalog.POOL_WAIT)


def test_every_metric_is_documented() -> None:
    """docs/metrics.md has a section for every row of the catalog, and no other."""
    page = (support.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert re.findall(r"^### `(.+)`$", page, re.MULTILINE) == [
        metric.name for stem in dict.fromkeys(m.stem for m in catalog.ALL) for metric in catalog.of_stem(stem)
    ]


def test_panels_are_built_without_warnings() -> None:
    """The SDK's deprecation warnings do not reach those who build boards."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels.lines("Title", "Question?", "s", panels.Query("vector(1)", "one")).build()
