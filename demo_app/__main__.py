"""``python -m demo_app``: runs the demo and switches its faults."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

HOME = Path(__file__).parents[1] / ".demo"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("demo_app"):
            raise
        print(f"{error.name} is not installed: run `make demo`, or pip install -e '.[demo]'", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo_app", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="start everything: servers, shop, worker, sidecar, alerting, load")
    demo.add_argument("--duration", type=float, help="seconds to run (default: until Ctrl-C)")
    demo.add_argument("--fault", help="switch this fault on and off on the way; fails unless its alert comes and goes")
    demo.add_argument("--scale", type=float, default=20.0, help="divide the rules' time scales by this (default 20)")
    demo.add_argument("--home", type=Path, default=HOME, help="folder for all that it writes (default .demo)")
    demo.set_defaults(run=_demo)
    fault = commands.add_parser("fault", help="switch a fault of the running demo")
    fault.add_argument("name")
    fault.add_argument("state", choices=("on", "off"))
    fault.set_defaults(run=_fault)
    commands.add_parser("faults", help="list the faults").set_defaults(run=_faults)
    commands.add_parser("seed", help="fill an empty database").set_defaults(run=_seed)
    commands.add_parser("servers", help="install the servers that are missing, those of the tests too").set_defaults(
        run=_servers
    )
    inbox = commands.add_parser("inbox", help="receive Alertmanager's webhooks")
    inbox.add_argument("--host", default="127.0.0.1")
    inbox.add_argument("--port", type=int, default=9095)
    inbox.set_defaults(run=_inbox)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from demo_app.stack.demo import run_demo

    if options.fault and not _known(options.fault):
        return 2
    if options.scale <= 0 or (options.duration is not None and options.duration <= 0):
        print("--scale and --duration must be above 0", file=sys.stderr)
        return 2
    return run_demo(home=options.home, duration=options.duration, fault=options.fault, scale=options.scale)


def _fault(options: argparse.Namespace) -> int:
    from demo_app.faults import switches

    if not _known(options.name):
        return 2
    switches.set(options.name, options.state == "on")
    return _faults(options)


def _faults(_: argparse.Namespace) -> int:
    from demo_app.faults import FAULTS, switches

    on = switches.all_on()
    for fault in FAULTS.values():
        print(f"{'on ' if fault.name in on else 'off'}  {fault.name:<18} {fault.what}")
    return 0


def _known(name: str) -> bool:
    from demo_app.faults import FAULTS

    if name not in FAULTS:
        print(f"there is no fault {name!r}; the faults are {', '.join(FAULTS)}", file=sys.stderr)
    return name in FAULTS


def _seed(_: argparse.Namespace) -> None:
    from demo_app.seed import seed

    asyncio.run(seed())


def _servers(_: argparse.Namespace) -> int:
    from demo_app.stack.packages import PackagesMissingError, ensure_packages
    from demo_app.stack.servers import PACKAGES, TEST_PACKAGES

    try:
        ensure_packages(print, PACKAGES | TEST_PACKAGES)
    except PackagesMissingError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _inbox(options: argparse.Namespace) -> None:
    from demo_app.inbox import Inbox, make_server

    make_server(options.host, options.port, Inbox()).serve_forever()


if __name__ == "__main__":
    raise SystemExit(main())
