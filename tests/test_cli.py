"""The command ``headroom``."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

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
    """``headroom version`` prints what is installed, as a command of its own."""
    command = Path(sys.executable).parent / "headroom"
    done = subprocess.run([command, "version"], capture_output=True, text=True, timeout=30, check=True)
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


@pytest.mark.parametrize("arguments", [[], ["pack"], ["pack", "export"], ["sidecar", "--prot", "1"]])
def test_a_wrong_command_line_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing or unknown is named, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: headroom" in capsys.readouterr().err


def test_pack_export_prints_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``headroom pack export`` hands over the folder and prints the files, one per line."""
    module = ModuleType("fastapi_headroom.pack.export")
    module.__dict__["export"] = lambda to: [to / "dashboards" / "a.json", to / "alerts" / "b.yml"]
    monkeypatch.setitem(sys.modules, "fastapi_headroom.pack.export", module)
    assert cli.main(["pack", "export", "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/dashboards/a.json\n{tmp_path}/alerts/b.yml\n"
