"""Copy the shipped boards, rules and runbooks to where Grafana and Prometheus read them.

Needs nothing but the standard library: the files were built beforehand and come with the package.
"""

from __future__ import annotations

from pathlib import Path

from fastapi_headroom.errors import HeadroomError

_PATTERNS = ("dashboards/*.json", "alerts/*.rules.yml", "alerts/alertmanager.yml", "alerts/runbooks/*.md")


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
    ``to/alerts``, runbooks to ``to/alerts/runbooks``. ``runbook_base`` and ``grafana_url`` are put in front of the
    relative addresses in the rules' annotations, such as ``https://wiki.example/runbooks/`` and
    ``https://grafana.example``.
    """
    source = shipped()
    written = []
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            target = to / path.relative_to(source)
            text = path.read_text(encoding="utf-8")
            if path.name.endswith(".rules.yml"):
                text = _with_addresses(text, runbook_base, grafana_url)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            written.append(target)
    return written


def _with_addresses(text: str, runbook_base: str, grafana_url: str) -> str:
    if runbook_base:
        text = text.replace("runbook_url: alerts/runbooks/", f"runbook_url: {runbook_base.rstrip('/')}/")
    if grafana_url:
        text = text.replace("dashboard_url: /d/", f"dashboard_url: {grafana_url.rstrip('/')}/d/")
    return text
