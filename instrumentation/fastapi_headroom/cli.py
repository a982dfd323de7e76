"""The command ``headroom``: arguments only. What they ask for is done by the exporter and the pack."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi_headroom import settings
from fastapi_headroom.errors import HeadroomError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 when it could not do what was asked."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except HeadroomError as error:
        print(f"headroom {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headroom", description="How much is left before a FastAPI app falls over.")
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
    sidecar.set_defaults(run=_sidecar)

    pack = commands.add_parser("pack", help="boards and alert rules")
    pack_commands = pack.add_subparsers(dest="pack_command", required=True, metavar="COMMAND")
    export = pack_commands.add_parser("export", help="write boards and alert rules for file provisioning")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to write to")
    export.add_argument("--format", choices=("files",), default="files", help="what to write (files)")
    export.set_defaults(run=_pack_export)

    commands.add_parser("version", help="print the version").set_defaults(run=_version)
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
    from fastapi_headroom.pack.export import export

    for path in export(options.to):
        print(path)
    return 0


def _version(options: argparse.Namespace) -> int:
    print(f"fastapi-headroom {metadata.version('fastapi-headroom')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
