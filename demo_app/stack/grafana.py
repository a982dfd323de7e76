"""Finds Grafana and runs it with the boards provisioned. It is no Debian package, so the demo does without."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from demo_app.stack.process import Process, accepts, free_port

HOW_TO_GET_IT = (
    "Grafana was not found: unpack its standalone Linux binaries (grafana.com/grafana/download) "
    "and run again with GRAFANA_HOME=<that folder>"
)


class Grafana(Process):
    """Grafana on a free loopback port; everybody on this machine may look without a login, nobody may change."""

    def __init__(self, command: list[str], home: Path, *, data: Path, provisioning: Path, first_board: Path, log: Path):
        self.port = free_port()
        settings = {
            "GF_PATHS_DATA": data,
            "GF_PATHS_LOGS": data / "logs",
            "GF_PATHS_PLUGINS": data / "plugins",
            "GF_PATHS_PROVISIONING": provisioning,
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": self.port,
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
            "GF_USERS_DEFAULT_THEME": "light",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
            "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        }
        if first_board.exists():
            settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] = first_board
        super().__init__(
            "grafana",
            [*command, "--homepath", str(home)],
            log=log,
            cwd=home,
            env={**os.environ, **{key: str(value) for key, value in settings.items()}},
            ready=lambda: accepts(self.port),
        )

    @property
    def url(self) -> str:
        """The address of its pages."""
        return f"http://127.0.0.1:{self.port}"


def find_grafana() -> tuple[list[str], Path] | None:
    """Return the command that runs Grafana's server and its home folder; None when it is not here."""
    homes = [Path(os.environ["GRAFANA_HOME"])] if os.environ.get("GRAFANA_HOME") else []
    for name in ("grafana", "grafana-server"):
        if found := shutil.which(name):
            homes += [Path(found).resolve().parents[1], Path("/usr/share/grafana")]
    for home in homes:
        if (binary := home / "bin" / "grafana").exists():
            return [str(binary), "server"], home.resolve()
        if (binary := home / "bin" / "grafana-server").exists():
            return [str(binary)], home.resolve()
    return None
