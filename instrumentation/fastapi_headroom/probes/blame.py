"""Whose fault a block is: from stacks to a site, and from what the kernel counted to a cause. Pure: reads, never waits.

A *site* is ``module:function:line``, where ``line`` is the function's first one: it stays the same from sample to
sample, so a function has one series. The log record has the line that was running.
"""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, CO_ITERABLE_COROUTINE, unwrap
from itertools import dropwhile
from pathlib import Path
from statistics import median
from types import CodeType, FrameType, FunctionType
from typing import Any, Final, Literal, NamedTuple

from fastapi_headroom.ledger import Ledger

Cause = Literal["python", "native", "io", "gil", "gc", "starved"]
Owner = Literal["user", "library", "stdlib", "ours"]
UNKNOWN: Final = "unknown"
"""The site when nothing was sampled, or when the code is not to blame (``starved``)."""
STACK_LINES: Final = 12
"""Innermost frames that a log record shows."""
MOSTLY: Final = 0.8
"""Share of the looks that find a thread in one call from which on that call is what it did."""
_OURS: Final = str(Path(__file__).parents[1])
_DRIVER: Final = "fastapi_headroom.driver"
_DRIVERS: Final = frozenset({_DRIVER, "fastapi_headroom.probes.request"})
"""Modules that run steps: the request probe runs the first step of each request itself."""
_ROUTERS: Final = ("starlette.routing", "fastapi.routing")
_STDLIB: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
_RESUMES: Final = CO_COROUTINE | CO_ITERABLE_COROUTINE | CO_GENERATOR | CO_ASYNC_GENERATOR
_PACKAGES: Final = ("/site-packages/", "/dist-packages/")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a thread's stack."""

    site: str
    position: tuple[int, int, int]
    """Which frame runs (its id and depth) and its instruction: the same twice means that it did not move on."""
    in_call: bool
    """False when the instruction is one where the interpreter itself gives way (a jump, a function's start)."""
    waited: float
    """Seconds that the sampling thread waited for the GIL, or a CPU, before it could look."""
    stack: tuple[str, ...]
    """``file:line function``, innermost first; without the frames of this package that the call goes through."""
    ledger: Ledger | None = None
    """That of the request whose step runs."""


class Look(NamedTuple):
    """A sample, and the frame that tells the step that it found from others."""

    sample: Sample
    base: FrameType | None
    """Outermost frame of the step: a coroutine's, or that of a function which the loop called; None between two."""
    began: float | None
    """When the step began (``time.perf_counter``), where the step driver knows it: exactly, for those of requests."""
    ours: bool = False
    """Code of this package is what runs, if below functions of the standard library."""

    @property
    def resumes(self) -> bool:
        """Return whether the base frame lives on when its step is over: that of a coroutine does."""
        return self.base is not None and bool(self.base.f_code.co_flags & _RESUMES)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What happened between two looks at the clocks, in seconds.

    ``cpu`` and ``ready`` are of the blocked thread: on a CPU, and ready but without one. ``process_cpu`` is that of
    all threads. ``watchdog_late`` is how long the watchdog could not run either, in stretches too long for Python code
    that takes turns, and not for want of a CPU. ``collecting`` is time in the
    garbage collector. ``waits_for_lock`` says whether the thread sat in a lock's system call when looked at; None
    where the system does not tell, and when it was about to go on each time.
    """

    wall: float
    cpu: float
    ready: float
    process_cpu: float
    watchdog_late: float
    collecting: float
    waits_for_lock: bool | None
    wakes: float | None = None
    """Times that the blocked thread woke, for each that one which waits for the GIL does; None when not known."""


def cause_of(evidence: Evidence, samples: Sequence[Sample]) -> Cause:
    """Return what a blocked thread did for the largest part of the time.

    * ``gc``: the garbage collector ran for half of it.
    * ``python``, ``native``: the thread used a CPU; in C when the watchdog could not run for half of the time (the
      call kept the GIL), or when the stack stood at one call in four samples of five while the GIL was free.
    * ``starved``: it was ready and got no CPU; or no thread of the process ran at all (stopped, or swapped out).
    * ``gil``: it slept in a lock and woke again and again, as one that waits for the GIL does, or while other threads
      of the process computed; or the watchdog slept with it.
    * ``io``: it slept in any other system call, a lock or a ``sleep`` among them.
    """
    half = evidence.wall / 2
    asleep = max(0.0, evidence.wall - evidence.cpu - evidence.ready)
    others = max(0.0, evidence.process_cpu - evidence.cpu)
    if evidence.collecting >= half:
        return "gc"
    if evidence.cpu >= max(evidence.ready, asleep):
        return "native" if evidence.watchdog_late >= half or _in_one_call(samples) else "python"
    if evidence.ready >= asleep:
        return "starved"
    # Who keeps the GIL may have got little CPU itself: what the thread woke for tells more.
    kept = others >= asleep / 2 or (evidence.wakes is not None and evidence.wakes >= 0.5)
    if evidence.watchdog_late >= half:
        return "gil" if kept else "starved"
    return "gil" if kept and evidence.waits_for_lock is not False else "io"


def _in_one_call(samples: Sequence[Sample]) -> bool:
    """Return whether the thread was, in four looks of five, in one C call that had released the GIL.

    Where the stack stood is not enough: a loop over short calls gives way at the same instruction each time. But it
    makes whoever wants the GIL wait for a switch interval.
    """
    if len(samples) < 2:
        return False
    # The last look may come when the call has just returned.
    (_, in_call), times = Counter((sample.position, sample.in_call) for sample in samples).most_common(1)[0]
    if times < MOSTLY * len(samples) or not in_call:
        return False
    return median(sample.waited for sample in samples) < sys.getswitchinterval() / 2


def look_at(frame: FrameType, skip: int = 0, waited: float = 0.0, outer: FrameType | None = None) -> Look:
    """Look at the stack that ends in ``frame``, after waiting ``waited`` seconds for the GIL.

    ``skip`` is the number of outermost frames that belong to whoever runs the loop: they are on every stack and
    are never to blame. ``outer`` is where the stack goes on when ``frame`` runs in a greenlet: SQLAlchemy's async
    sessions run their sync part in one, whose stack ends where that part begins.
    """
    frames = list(outwards(frame))
    if outer is not None:
        rest = list(outwards(outer))
        if rest[-1] is not frames[-1]:  # else the greenlet was left just now
            frames += rest
    inner = frames[: len(frames) - skip]
    code = frame.f_code
    frames = inner or frames[:1]
    shown = list(dropwhile(_is_ours, frames)) or frames
    sample = Sample(
        site=_responsible(frames) if inner else UNKNOWN,
        position=(id(frame), len(frames), frame.f_lasti),
        in_call=_in_call(code, frame.f_lasti),
        waited=waited,
        stack=tuple(f"{f.f_code.co_filename}:{f.f_lineno} {f.f_code.co_qualname}" for f in shown[:STACK_LINES]),
        ledger=_ledger(frames),
    )
    base = inner[-1] if inner else None
    owners = (owner_of(f.f_code.co_filename) for f in frames)
    ours = next((owner for owner in owners if owner != "stdlib"), "user") == "ours"
    return Look(sample, base, None if base is None else _began(base), ours)


def _responsible(frames: Sequence[FrameType]) -> str:
    """Return the site of a step: without code of the user's on the stack, the endpoint that the libraries work for.

    They may turn its result into JSON, or it may have returned from the call that took long a moment ago.
    """
    if any(owner_of(frame.f_code.co_filename) == "user" for frame in frames):
        return site_of(frames)
    return endpoint_of(frames) or site_of(frames)


def endpoint_of(frames: Iterable[FrameType]) -> str | None:
    """Return the site of the endpoint that a router on the stack has found, if it is a function of the user's."""
    for frame in frames:
        if frame.f_globals.get("__name__") in _ROUTERS and "scope" in frame.f_code.co_varnames:
            scope = frame.f_locals.get("scope")
            endpoint = scope.get("endpoint") if isinstance(scope, MutableMapping) else None
            if (site := site_of_endpoint(endpoint)) is not None:
                return site
    return None


def site_of_endpoint(endpoint: Any) -> str | None:
    """Return the site of an endpoint, if it is a function of the user's."""
    function = unwrap(endpoint) if callable(endpoint) else None
    if isinstance(function, FunctionType) and owner_of(function.__code__.co_filename) == "user":
        return _site(function.__module__, function.__code__)
    return None


def site_of(frames: Iterable[FrameType]) -> str:
    """Return the site of the deepest frame of the user's code, given innermost first.

    Without one, it is the deepest frame of a library, and without that one ``unknown``.
    """
    fallback = UNKNOWN
    for frame in frames:
        owner = owner_of(frame.f_code.co_filename)
        if owner == "user":
            return _name(frame)
        if owner == "library" and fallback == UNKNOWN:
            fallback = _name(frame)
    return fallback


@lru_cache(maxsize=4096)
def owner_of(filename: str) -> Owner:
    """Return whose code a file is, by where it lies."""
    if filename.startswith(_OURS):
        return "ours"
    if any(folder in filename for folder in _PACKAGES):
        return "library"
    if filename.startswith((*_STDLIB, "<")):
        return "stdlib"
    return "user"


def most_common(samples: Sequence[Sample]) -> str:
    """Return the site of most samples that have one."""
    counts = Counter(sample.site for sample in samples if sample.site != UNKNOWN)
    return counts.most_common(1)[0][0] if counts else UNKNOWN


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frame and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def depth_of(frame: FrameType | None) -> int:
    """Return the number of frames from this one to the thread's first, below what a loop runs.

    From Python 3.14 on asyncio has one frame more below a callback that came from another thread, which is left out:
    below all others it is not.
    """
    return sum(found.f_code.co_qualname != "_ThreadSafeHandle._run" for found in outwards(frame))


def _name(frame: FrameType) -> str:
    return _site(frame.f_globals.get("__name__", "?"), frame.f_code)


def _site(module: str, code: CodeType) -> str:
    return f"{module}:{code.co_qualname.replace('<locals>.', '')}:{code.co_firstlineno}"


def _in_call(code: CodeType, instruction: int) -> bool:
    if not 0 <= instruction < len(code.co_code):
        return False
    name = dis.opname[code.co_code[instruction]]
    # These are where the interpreter looks for requests to give way: a sample there says nothing about C code.
    return not ("JUMP" in name or name in ("RESUME", "NOP", "SEND"))


def _is_ours(frame: FrameType) -> bool:
    return owner_of(frame.f_code.co_filename) == "ours"


def _began(base: FrameType) -> float | None:
    """Return when the step driver, if it is what the loop called, began the step."""
    if base.f_globals.get("__name__") != _DRIVER:
        return None
    began = base.f_locals.get("started")
    return began if isinstance(began, float) else None


def _ledger(frames: Iterable[FrameType]) -> Ledger | None:
    """Return the ledger of the request whose step runs, from the step driver's frame."""
    for frame in frames:
        if frame.f_globals.get("__name__") in _DRIVERS:
            ledger = frame.f_locals.get("ledger")
            if isinstance(ledger, Ledger):
                return ledger
    return None
