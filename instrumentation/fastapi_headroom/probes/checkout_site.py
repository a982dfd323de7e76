"""Where a connection was checked out, and where its holder stands now.

A checkout keeps the code objects of the innermost of the user's frames and the instructions that they were at: three
pointers and numbers, and no frame, which would keep the user's variables alive. Names and lines are made of them only
when somebody asks.
"""

from __future__ import annotations

import sys
from asyncio import AbstractEventLoop, Task, current_task
from collections.abc import Iterable
from sys import _getframe
from types import CodeType, FrameType
from typing import Any, Final
from weakref import ref

from fastapi_headroom.probes.blame import Owner, outwards, owner_of
from fastapi_headroom.probes.foreign_frames import walking
from fastapi_headroom.sockets import suspended_frames

FRAMES: Final = 24
"""Frames among which the user's are looked for: a synchronous session's own take about a dozen."""
_NEAREST: Final = 4
"""Frames above ``_begin`` from which on the user's may begin: below are the hook's and ``Engine.raw_connection``."""
KEPT: Final = 2
"""The innermost of the user's frames that are kept: the one that asks for a connection and its caller."""
UNKNOWN: Final = "unknown"
Site = tuple[tuple[CodeType, int], ...]
"""Code and instruction of the user's frames, innermost first."""
Holder = ref[Task[Any]] | int | None
"""The task that holds a connection, or the thread. A reference to the task would keep alive what it has forgotten."""


class _Owners(dict[str, Owner]):
    """Whose code a file is: a look-up in a dict costs a third of a call."""

    def __missing__(self, filename: str) -> Owner:
        if len(self) >= 4096:  # names that a program makes up as it runs
            self.clear()
        owner = self[filename] = owner_of(filename)
        return owner


_owners: Final = _Owners()


def checkout_site(greenlet: Any, state: Any) -> Site:
    """Return where the user's code asked for a connection; empty when that is too far away. Costs about 1 us.

    ``greenlet`` is the one that runs the synchronous part of an async engine: the user's code is below it, in the
    frames of its parent. None for a sync engine; ``state.depth`` is how far away the user's code was the last
    time, 0 if that is unknown.
    """
    frame: FrameType | None = None
    found: Site = ()
    owners = _owners
    if greenlet is not None:
        parent = greenlet.parent
        frame = None if parent is None else parent.gr_frame
    elif state.depth:  # nearly always the user's code begins where it began the last time: that is looked at first
        try:
            inner = _getframe(state.depth - 2)  # one below: the depth is that of _begin, which is called from here
        except ValueError:  # the stack is not that deep
            inner = None
        if inner is not None and owners[inner.f_code.co_filename] != "user":
            begin = inner.f_back
            if begin is not None:
                code = begin.f_code
                if owners[code.co_filename] == "user":
                    frame = begin.f_back
                    found = ((code, begin.f_lasti),)
                    if frame is None:
                        return found
                    code = frame.f_code
                    if owners[code.co_filename] == "user":
                        return (*found, (code, frame.f_lasti))
    if frame is None:
        frame = _begin(state)
    for _ in range(FRAMES):
        code = frame.f_code
        owner = owners[code.co_filename]
        if owner == "user":
            found += ((code, frame.f_lasti),)
            if len(found) == KEPT:
                break
        elif found and owner == "library":  # the standard library's are those of context managers
            break
        frame = frame.f_back
        if frame is None:
            break
    return found


def _begin(state: Any) -> FrameType:
    """Return the frame from which on the user's are looked for.

    A session has a dozen frames of its own, and each look makes an object of a frame: they are stepped over to where
    the user's code began the last time, if it begins there now, or one further.
    """
    owners, depth = _owners, state.depth
    if depth:
        try:
            frame = _getframe(depth)
            if owners[frame.f_code.co_filename] == "user":
                inner = _getframe(depth - 1)
                while owners[inner.f_code.co_filename] == "user":
                    frame, depth = inner, depth - 1
                    inner = _getframe(depth - 1)
                state.depth = depth
                return frame
            outer = frame.f_back
            if outer is not None and owners[outer.f_code.co_filename] == "user":
                state.depth = depth + 1
                return outer
        except ValueError:  # the stack is not that deep
            pass
    first = found = _getframe(_NEAREST)
    for depth in range(_NEAREST, FRAMES):
        if owners[found.f_code.co_filename] == "user":
            state.depth = depth
            return found
        if found.f_back is None:
            break
        found = found.f_back
    return first


def task_here(likely: AbstractEventLoop | None) -> Holder:
    """Return the task that runs, None outside of one.

    ``likely`` is the loop that it probably runs on: to ask which one does is a system call (CPython 3.11).
    """
    task = None if likely is None else current_task(likely)
    if task is None:
        task = current_task()
    return None if task is None else ref(task)


def where_now(holder: Holder, site: Site) -> str | None:
    """Return where the user's code stands that holds a connection; None when it has ended, or is not to be found.

    Asked from another thread: a task that runs meanwhile may have moved on.
    """
    with walking():
        if isinstance(holder, int):
            frames = list(outwards(sys._current_frames().get(holder)))
            # Another thread may have got the number of one that has ended.
            return named(frames) if site and any(frame.f_code is site[0][0] for frame in frames) else None
        task = None if holder is None else holder()
        if task is None or task.done():
            return None
        return named(reversed(suspended_frames(task.get_coro())))


def described(site: Site) -> str:
    """Return ``module:function:line`` of each frame, innermost first."""
    return " < ".join(_name(_module(code), code, _line(code, at)) for code, at in site) or UNKNOWN


def key(site: Site) -> str:
    """Return what is the same for all checkouts of one function."""
    return f"{site[0][0].co_filename}:{site[0][0].co_firstlineno}" if site else UNKNOWN


def named(frames: Iterable[FrameType]) -> str | None:
    """Return ``module:function:line`` of the innermost frame of the user's, given innermost first."""
    for frame in frames:
        if _owners[frame.f_code.co_filename] == "user":
            return _name(frame.f_globals.get("__name__", "?"), frame.f_code, frame.f_lineno)
    return None


def frames_here(depth: int = 0) -> list[FrameType]:
    """Return the frames that run, innermost first, on into those on whose behalf a greenlet runs."""
    frames = list(outwards(_getframe(depth + 1)))
    module = sys.modules.get("greenlet")
    greenlet = None if module is None else module.getcurrent().parent
    while greenlet is not None:
        frames += outwards(greenlet.gr_frame)
        greenlet = greenlet.parent
    return frames


def _name(module: str, code: CodeType, line: int | None) -> str:
    return f"{module}:{code.co_qualname.replace('<locals>.', '')}:{line or code.co_firstlineno}"


def _line(code: CodeType, instruction: int) -> int | None:
    for start, end, line in code.co_lines():
        if start <= instruction < end:
            return line
    return None


def _module(code: CodeType) -> str:
    """Return the name of the module that a file was imported as."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == code.co_filename:
            return name
    return "?"
