"""The pages that tell users what to type are right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastapi_headroom import cli
from fastapi_headroom.settings import PREFIX, Settings

DOCS = Path(__file__).parents[1] / "docs"
SIDECAR = (DOCS / "sidecar.md").read_text()
BOARDS = (DOCS / "boards-and-alerts.md").read_text()


def test_all_settings_are_listed_with_their_defaults() -> None:
    """The table has a row for every setting, none that there is not, and simple defaults are those of the code."""
    rows = dict(re.findall(r"^\| `HEADROOM_(\w+)` \|[^|]*\| ?([^|]*?) ?\|", SIDECAR, re.MULTILINE))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, bool | int | float):
            assert rows[name.upper()] == str(field.default).lower(), name
    assert set(re.findall(rf"{PREFIX}(\w+)", SIDECAR)) <= set(rows)


def test_all_options_of_the_sidecar_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """What the page says about options is what ``headroom sidecar --help`` says."""
    with pytest.raises(SystemExit):
        cli.main(["sidecar", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    table = SIDECAR[SIDECAR.index("## All settings") :]
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == known


def test_the_configurations_of_the_page_are_yaml() -> None:
    """Compose, Kubernetes and Prometheus snippets parse."""
    blocks = [block.strip("\n") for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", SIDECAR, re.MULTILINE)]
    parsed = [yaml.safe_load(block) for block in blocks if re.match(r" {4}(services|spec|scrape_configs):", block)]
    assert {next(iter(document)) for document in parsed} == {"services", "spec", "scrape_configs"}


def test_what_the_page_on_boards_says_to_type_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Its configurations are YAML, its options those of ``headroom pack export``, its files are shipped."""
    blocks = [block.strip("\n") for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", BOARDS, re.MULTILINE)]
    parsed = [yaml.safe_load(block) for block in blocks if re.match(r" {4}(scrape_configs|apiVersion):", block)]
    assert [next(iter(document)) for document in parsed] == ["scrape_configs", "apiVersion", "apiVersion"]
    with pytest.raises(SystemExit):
        cli.main(["pack", "export", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = " ".join(re.findall(r"headroom pack export.*", BOARDS))
    assert set(re.findall(r"--[a-z-]+", commands)) == known - {"--help"}
    for pattern in re.findall(r"^\| `([^`]+)` \| [A-Za-z]+", BOARDS, re.MULTILINE):
        assert list((DOCS.parent).glob(pattern)), pattern


def test_the_example_of_a_test_passes(tmp_path: Path) -> None:
    """The page on tests holds tests that pytest runs as they stand, in a fresh process, and that leave no files."""
    metrics, blocking, _ = re.findall(r"```python\n(.*?)```", (DOCS / "testing.md").read_text(), re.DOTALL)
    (tmp_path / "test_example.py").write_text(metrics)
    (tmp_path / "test_blocking.py").write_text(blocking)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert not list(Path("/dev/shm").glob(f"headroom-*-{tmp_path.name}"))
