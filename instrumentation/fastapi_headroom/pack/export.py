"""Copy the shipped boards, rules and runbooks to where Grafana, Prometheus and Kubernetes read them.

Needs nothing but the standard library: the files were built beforehand and come with the package.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

from fastapi_headroom.errors import HeadroomError

_PATTERNS = (
    "dashboards/*.json",
    "dashboards/README.md",
    "alerts/*.rules.yml",
    "alerts/alertmanager.yml",
    "alerts/runbooks/*.md",
    "alerts/tests/*.test.yml",
)
_RULE = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {name}
  labels:
    app.kubernetes.io/name: fastapi-headroom
spec:
{content}"""
_BOARD = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}
  labels:
    app.kubernetes.io/name: fastapi-headroom
    grafana_dashboard: "1"
data:
  {file}: |
{content}"""


def shipped() -> Path:
    """Return the folder that holds ``dashboards`` and ``alerts``: package data, or the project in a source checkout.

    Raises HeadroomError when neither is there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "shipped", here.parents[2]):
        if (folder / "dashboards").is_dir() and (folder / "alerts").is_dir():
            return folder
    raise HeadroomError(f"boards and rules are missing beside {here}: install fastapi-headroom again from a wheel")


def export(to: Path, *, runbook_base: str = "", grafana_url: str = "") -> list[Path]:
    """Copy the shipped files below ``to`` and return the paths written.

    Boards go to ``to/dashboards`` (for a file provider of Grafana), rules and Alertmanager's configuration to
    ``to/alerts``, runbooks to ``to/alerts/runbooks``, promtool's tests of the rules to ``to/alerts/tests``.
    ``runbook_base`` and ``grafana_url`` are put in front of the relative addresses in the rules' annotations, such as
    ``https://wiki.example/runbooks/`` and ``https://grafana.example``. Raises HeadroomError when ``to`` cannot be
    written.
    """
    source = shipped()
    written = []
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            text = _with_addresses(path.read_text(encoding="utf-8"), path, runbook_base, grafana_url)
            written.append(_write(to / path.relative_to(source), text))
    return written


def export_kubernetes(to: Path, *, runbook_base: str = "", grafana_url: str = "") -> list[Path]:
    """Write a PrometheusRule per file of rules and a ConfigMap per board into ``to``; return the paths written.

    The objects name no namespace. ConfigMaps have the label that Grafana's dashboard sidecar looks for by default,
    ``grafana_dashboard``; each is below what ``kubectl apply`` can keep. Raises HeadroomError when ``to`` cannot be
    written.
    """
    source = shipped()
    written = []
    for path in sorted(source.glob("alerts/*.rules.yml")):
        name = f"headroom-{path.name.removesuffix('.rules.yml')}"
        text = _with_addresses(path.read_text(encoding="utf-8"), path, runbook_base, grafana_url)
        groups = text[text.index("groups:") :]
        written.append(_write(to / f"{name}-rules.yaml", _RULE.format(name=name, content=indent(groups, "  "))))
    for path in sorted(source.glob("dashboards/*.json")):
        content = indent(path.read_text(encoding="utf-8"), "    ")
        text = _BOARD.format(name=f"{path.stem}-board", file=path.name, content=content)
        written.append(_write(to / f"{path.stem}-board.yaml", text))
    return written


def _with_addresses(text: str, path: Path, runbook_base: str, grafana_url: str) -> str:
    if path.suffix == ".yml" and runbook_base:
        text = text.replace("runbook_url: alerts/runbooks/", f"runbook_url: {runbook_base.rstrip('/')}/")
    if path.suffix == ".yml" and grafana_url:
        text = text.replace("dashboard_url: /d/", f"dashboard_url: {grafana_url.rstrip('/')}/d/")
    return text


def _write(target: Path, text: str) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HeadroomError(
            f"{target} cannot be written ({error.strerror}): name a directory that this user may write to with --to"
        ) from error
    return target
