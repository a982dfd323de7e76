"""``make demo``: sets the stack up, tells where to look, and ends it whatever happens."""

from __future__ import annotations

import fcntl
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from demo_app.faults import FAULTS
from demo_app.settings import shop_settings
from demo_app.stack.drill import Drill
from demo_app.stack.packages import PackagesMissingError, ensure_packages
from demo_app.stack.process import ProcessError
from demo_app.stack.servers import MissingBinaryError
from demo_app.stack.stack import ROOT, Stack

_WHAT_TO_SEE = {
    "Grafana": ("/d/headroom-overview", "the boards; begin at the Overview: what gives way first?"),
    "Inbox": ("/", "the alerts that arrived"),
    "Prometheus": ("/alerts", "the rules, and which are pending or firing"),
    "Alertmanager": ("/", "routing, inhibition and silences"),
    "Sidecar": ("/metrics", "what Prometheus scrapes; it answers while the shop's event loop is stuck"),
    "Shop": ("/docs", "the app that is measured"),
}


class Stopped(Exception):  # noqa: N818
    """Somebody asked for the end: Ctrl-C, or a signal."""


def run_demo(*, home: Path, duration: float | None, fault: str | None, scale: float) -> int:
    """Run the demo until it is stopped, or for ``duration`` seconds; return the exit status.

    0 when it was stopped, or all went as it should; 1 when a part failed or the fault's alert did not arrive
    and resolve; 130 when a run with a time limit was cut short.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    home = home.resolve()
    stack = Stack(home, scale=scale, say=say)
    try:
        with _only_one(home), _signals():
            try:
                ensure_packages(say)
                stack.start()
                return _use(stack, duration or (120.0 if fault else None), fault, say)
            finally:
                _ignore_signals()
                say("stopping all parts")
                stack.stop()
                stack.switches.clear()
                say(f"stopped; logs are in {stack.logs}")
    except Stopped:
        return 0 if duration is None and fault is None else 130
    except (ProcessError, PackagesMissingError, MissingBinaryError, TimeoutError, OSError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1


def _use(stack: Stack, duration: float | None, fault: str | None, say: Callable[[str], None]) -> int:
    print(_table(stack), flush=True)
    if duration is None:
        while True:
            stack.check()
            time.sleep(0.5)
    drill = Drill(stack, duration, say)
    passed = drill.run(fault)
    print(f"\n{drill.report()}\n")
    print(f"{'passed' if passed else 'FAILED'}: " + _promise(fault), flush=True)
    return 0 if passed else 1


def _promise(fault: str | None) -> str:
    if fault is None:
        return "a healthy run brings no alert but the Watchdog"
    return f"{' or '.join(FAULTS[fault].alerts)} is delivered to the inbox and resolves"


def _table(stack: Stack) -> str:
    rows = [
        f"  {name:<13} {stack.addresses[name] + path:<46} {what}"
        for name, (path, what) in _WHAT_TO_SEE.items()
        if name in stack.addresses
    ]
    place = "" if stack.run == shop_settings().run_directory else f"SHOP_RUN_DIRECTORY={stack.run} "
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    command = f"{place}{python} -m demo_app fault loop_block on"
    switch = f"  {'Faults':<13} {command:<46} {', '.join(FAULTS)}"
    notes = [f"  {note}" for note in stack.notes]
    return "\n".join(["", *rows, switch, *notes, "  Ctrl-C ends it all.", ""])


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the lock of ``.demo``: two demos of one checkout would overwrite each other's data."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "lock").open("w")
    except PermissionError as error:
        raise ProcessError(f"{home} belongs to another user: remove it, or run the demo as that user") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ProcessError(f"a demo runs in {home} already: stop it first") from error
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that ask for the end into an exception on the main thread."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    """Let nobody interrupt the stopping: an impatient second Ctrl-C would leave processes behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
