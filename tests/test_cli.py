"""The command ``headroom``."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fastapi_headroom import cli
from fastapi_headroom.exporter import sidecar
from fastapi_headroom.settings import Settings


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that the sidecar was run with."""
    runs: list[Settings] = []

    def run(settings: Settings) -> int:
        runs.append(settings)
        return 0

    monkeypatch.setattr(sidecar, "run", run)
    return runs


def test_the_version_is_the_distributions() -> None:
    """``headroom version`` and ``headroom --version`` print what is installed, as a command of its own."""
    command = Path(sys.executable).parent / "headroom"
    for argument in ("version", "--version"):
        done = subprocess.run([command, argument], capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == f"fastapi-headroom {metadata.version('fastapi-headroom')}\n"


def test_options_go_over_variables(given: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given as an option counts; what is not comes from HEADROOM_* variables."""
    monkeypatch.setenv("HEADROOM_PORT", "9000")
    monkeypatch.setenv("HEADROOM_HOST", "0.0.0.0")
    queues = ["celery+redis://a:6379/0?queues=x,y", "celery+redis://b:6379/0?queues=z"]
    arguments = ["sidecar", "--dir", "/some/where", "--port", "9001", "--queue", queues[0], "--queue", queues[1]]
    assert cli.main(arguments) == 0
    (settings,) = given
    assert (settings.store_directory, settings.host, settings.port) == (Path("/some/where"), "0.0.0.0", 9001)
    assert settings.queues == tuple(queues)


def test_the_service_names_the_default_directory(given: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """``--service`` finds the directory of an app that was told the same name."""
    for name in ("HEADROOM_DIRECTORY", "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["sidecar", "--service", "shop"]) == 0
    assert given[0].store_directory.name.endswith("-shop")


def test_a_value_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong port ends with status 2 and one line on standard error."""
    assert cli.main(["sidecar", "--port", "ninety"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "port='ninety' cannot be used" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "boards and alert rules"),
        (["pack"], "write boards and alert rules"),
        (["pack", "export"], "required: --to"),
        (["sidecar", "--prot", "1"], "did you mean --port?"),
        (["pack", "export", "--to", "x", "--grafana", "y", "z"], "unknown: z"),
        (["pack", "export", "--to", "x", "--format", "helm"], "files, kubernetes"),
    ],
)
def test_a_wrong_command_line_shows_the_usage(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing or unknown is named, with the usage of that command and status 2; no command shows the help."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert (
        " ".join(["usage: headroom", *(word for word in arguments[:2] if word in ("sidecar", "pack", "export"))])
        in error
    )
    assert says in error.replace("'", "")  # around each choice, or not, as the release of Python likes


def test_pack_export_prints_what_it_wrote_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``headroom pack export`` prints the files, one per line, and apart from them where they belong."""
    to = tmp_path / "pack"
    assert cli.main(["pack", "export", "--to", str(to), "--grafana-url", "https://grafana.example/"]) == 0
    printed = capsys.readouterr()
    assert {Path(line) for line in printed.out.splitlines()} == {path for path in to.rglob("*") if path.is_file()}
    assert f"{to}/alerts/*.rules.yml" in printed.err and f"{to}/dashboards" in printed.err
    assert "dashboard_url: https://grafana.example/d/headroom-pool" in (to / "alerts/pool.rules.yml").read_text()


def test_pack_export_for_kubernetes_says_what_to_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--format kubernetes`` writes manifests only, and the command that applies them."""
    assert cli.main(["pack", "export", "--format", "kubernetes", "--to", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert {Path(line) for line in printed.out.splitlines()} == set(tmp_path.glob("*.yaml"))
    assert f"kubectl apply -n NAMESPACE -f {tmp_path}" in printed.err


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where the directory should be is named with the remedy, status 2."""
    (tmp_path / "file").write_text("")
    assert cli.main(["pack", "export", "--to", str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"headroom pack: {tmp_path / 'file'}") and "--to" in line
