"""Faults that can be switched on and off while the shop runs.

The switches are one JSON file that all processes of the shop read, at most twice a second and only when it
changed. Nothing else carries them: a switch in Redis or PostgreSQL would show up in what is measured.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from demo_app.settings import shop_settings


@dataclass(frozen=True, slots=True)
class Fault:
    """A naive habit that can be switched on alone. One of ``alerts`` is the one that should tell."""

    name: str
    what: str
    alerts: tuple[str, ...]
    beside: tuple[str, ...] | None = None
    """Alerts of the same severity that may come as well; any other one fails the drill. None: that is not watched."""
    stops: str = ""
    """The part of the stack that is stopped while the fault is on: whoever runs the stack does it."""


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "pool_exhaustion",
            "orders keep their database connection while they wait for a slow outside call",
            ("HeadroomPoolExhausted", "HeadroomPoolWait"),
        ),
        Fault(
            "held_idle",
            "looks at an order keep their database connection over an outside call of 2.4 s",
            ("HeadroomConnectionsHeldIdle",),
        ),
        Fault(
            "slow_database",
            "every page of a list takes the database 0.7 s more, as without its index",
            ("HeadroomLatencyBudgetBurn",),
        ),
        Fault(
            "database_down",
            "PostgreSQL is stopped in the middle of its work, and started again when the fault is healed",
            ("HeadroomErrorBudgetBurn",),
            stops="postgres",
        ),
        Fault(
            "n_plus_one",
            "the list of users reads the posts of each user by a statement of its own",
            ("HeadroomQueriesPerRequestHigh",),
        ),
        Fault(
            "loop_block",
            "one in five product lists calls a synchronous 400 ms price service on the event loop",
            ("HeadroomEventLoopBlocked",),
        ),
        Fault(
            "sync_call",
            "one in five looks at a plan waits 400 ms for Redis, by a synchronous client on the event loop",
            ("HeadroomEventLoopBlocked",),
        ),
        Fault(
            "threadpool_starved",
            "each order tracks twenty parcels at once, each in a thread that waits for two seconds",
            ("HeadroomThreadpoolSaturated",),
        ),
        Fault("cache_off", "everything in Redis expires at once: every look-up misses", ("HeadroomCacheHitRatioLow",)),
        Fault(
            "queue_backlog",
            "campaigns send far too many mails, and each takes a worker half a second",
            ("HeadroomQueueTooOld",),
            beside=("HeadroomQueueNotDraining",),
        ),
        Fault(
            "dead_consumer",
            "the Celery worker is gone, and started again when the fault is healed",
            ("HeadroomQueueNoConsumers",),
            beside=(),
            stops="worker",
        ),
        Fault(
            "poison_task",
            "one mail in three is refused for good, and each of them is tried four times",
            ("HeadroomJobFailures",),
            beside=(),
        ),
        Fault("error_burst", "every second request for users and their posts raises", ("HeadroomErrorBudgetBurn",)),
    )
}


class Switches:
    """The state of all faults, as the file says. Unreadable or missing means that all are off."""

    def __init__(self, path: Path, interval: float = 0.5) -> None:
        self._path, self._interval = path, interval
        self._next_look, self._seen = 0.0, (0, 0)
        self._on: frozenset[str] = frozenset()

    def on(self, name: str) -> bool:
        """Return whether a fault is on; costs one clock read, and one stat each half second."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + self._interval
            self._look()
        return name in self._on

    def all_on(self) -> frozenset[str]:
        """Return the names of the faults that are on."""
        self._look()
        return self._on

    def set(self, name: str, on: bool) -> None:
        """Switch a fault for all processes of the shop. Raises KeyError when there is no such fault."""
        FAULTS[name]
        names = self.all_on() | {name} if on else self.all_on() - {name}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        draft.write_text(json.dumps(sorted(names)))
        draft.replace(self._path)
        self._look()

    def clear(self) -> None:
        """Switch all faults off."""
        self._path.unlink(missing_ok=True)

    def _look(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_ino)
            if seen != self._seen:
                self._on = frozenset(FAULTS.keys() & json.loads(self._path.read_text()))
                self._seen = seen
        except (OSError, ValueError, TypeError):
            self._on, self._seen = frozenset(), (0, 0)


switches = Switches(shop_settings().run_directory / "faults.json")


def strikes(name: str, share: float = 1.0) -> bool:
    """Return whether a fault is on and hits this time; ``share`` is how often, from 0 to 1."""
    return switches.on(name) and random.random() < share
