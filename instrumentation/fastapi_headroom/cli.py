"""The command ``headroom``: arguments only. What they ask for is done by the exporter and the pack."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from fastapi_headroom import settings
from fastapi_headroom.errors import HeadroomError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 when it could not do what was asked."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(options.parser, unknown)
    try:
        return int(options.run(options))
    except HeadroomError as error:
        print(f"headroom {options.command}: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Shows all of its help to who named no command, which is how a stranger asks what there is."""

    def error(self, message: str) -> NoReturn:
        if "required: COMMAND" not in message:
            super().error(message)
        self.print_help(sys.stderr)
        self.exit(2)


class _ShowVersion(argparse.Action):
    """Looks the version up when it is asked for: argparse's own action wants it before anything is."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        _version(namespace)
        parser.exit()


def _refuse(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    """Name what a command does not know, and what it knows that is spelled alike."""
    known = re.findall(r"--[a-z-]+", parser.format_help())
    near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
    parser.error(f"unknown: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="headroom", description="How much is left before a FastAPI app falls over.")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version of fastapi-headroom and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sidecar = commands.add_parser(
        "sidecar",
        help="serve the metrics of an app's workers",
        description="Serve the metrics of an app's workers, also while their event loops are stuck. "
        "Every option has a HEADROOM_* variable, which is its default.",
    )
    sidecar.add_argument("--dir", dest="directory", type=Path, help="directory of the store (HEADROOM_DIRECTORY)")
    sidecar.add_argument("--host", help="address to listen on (HEADROOM_HOST, 127.0.0.1)")
    sidecar.add_argument("--port", help="port to listen on (HEADROOM_PORT, 9464)")
    sidecar.add_argument(
        "--queue",
        dest="queues",
        action="append",
        metavar="URL",
        help="queue to poll, such as celery+redis://localhost:6379/0?queues=mail; repeatable (HEADROOM_QUEUES)",
    )
    sidecar.add_argument(
        "--cache",
        dest="cache_servers",
        action="append",
        metavar="URL",
        help="cache server to poll, such as redis://localhost:6379/0?name=main; repeatable (HEADROOM_CACHE_SERVERS)",
    )
    sidecar.add_argument(
        "--token-file",
        dest="exporter_token_file",
        type=Path,
        metavar="FILE",
        help="file with the bearer token that scrapers must show (HEADROOM_EXPORTER_TOKEN_FILE)",
    )
    sidecar.add_argument(
        "--certificate-file",
        dest="exporter_certificate_file",
        type=Path,
        metavar="FILE",
        help="PEM certificate, to serve over TLS (HEADROOM_EXPORTER_CERTIFICATE_FILE)",
    )
    sidecar.add_argument(
        "--key-file",
        dest="exporter_key_file",
        type=Path,
        metavar="FILE",
        help="PEM key of the certificate (HEADROOM_EXPORTER_KEY_FILE, the certificate's file)",
    )
    sidecar.add_argument(
        "--service", dest="service_name", metavar="NAME", help="service whose default directory is meant"
    )
    sidecar.set_defaults(run=_sidecar, parser=sidecar)

    pack = commands.add_parser("pack", help="boards and alert rules")
    pack_commands = pack.add_subparsers(dest="pack_command", required=True, metavar="COMMAND")
    export = pack_commands.add_parser("export", help="write boards and alert rules for file provisioning")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to write to")
    export.add_argument(
        "--format",
        choices=("files", "kubernetes"),
        default="files",
        help="files for Grafana, Prometheus and Alertmanager, or PrometheusRules and ConfigMaps (default: files)",
    )
    export.add_argument(
        "--runbook-base", default="", metavar="URL", help="where you publish the runbooks; alerts then link to them"
    )
    export.add_argument(
        "--grafana-url", default="", metavar="URL", help="address of your Grafana; alerts then link to its boards"
    )
    export.set_defaults(run=_pack_export, parser=export)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version, parser=version)
    return parser


def _sidecar(options: argparse.Namespace) -> int:
    from fastapi_headroom.exporter import sidecar

    names = (
        "directory",
        "host",
        "port",
        "queues",
        "cache_servers",
        "service_name",
        "exporter_token_file",
        "exporter_certificate_file",
        "exporter_key_file",
    )
    given: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    return sidecar.run(settings.load(**given))


def _pack_export(options: argparse.Namespace) -> int:
    from fastapi_headroom.pack import export

    write = export.export_kubernetes if options.format == "kubernetes" else export.export
    for path in write(options.to, runbook_base=options.runbook_base, grafana_url=options.grafana_url):
        print(path)
    print(_NEXT[options.format].format(to=options.to.resolve()), file=sys.stderr)
    return 0


_NEXT = {
    "files": """
Next: Prometheus   rule_files: ["{to}/alerts/*.rules.yml"]
      Grafana      a provider of dashboards with options: {{path: {to}/dashboards}}
      Alertmanager {to}/alerts/alertmanager.yml, with receivers of your own""",
    "kubernetes": """
Next: kubectl apply -n NAMESPACE -f {to}
      kubectl label -n NAMESPACE -f {to} release=NAME   # where your Prometheus selects rules by it""",
}
"""What to do with what was written; on standard error, so that the list of files stays a list of files."""


def _version(options: argparse.Namespace) -> int:
    print(f"fastapi-headroom {metadata.version('fastapi-headroom')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
