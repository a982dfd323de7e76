"""Stacks of other threads are read while the garbage collector is asked for at every turn."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from fastapi_headroom.probes import foreign_frames
from fastapi_headroom.probes.foreign_frames import walking
from tests.support.serving import ROOT

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python collects between instructions from 3.12 on")

WALKS = """
import gc, sys, threading, time
from fastapi_headroom.probes.foreign_frames import walking

sys.setrecursionlimit(5000)
sys.setswitchinterval(1e-5)
me = threading.get_ident()

def while_collecting(phase, info):  # gives the other thread time to go on
    end = time.perf_counter() + 0.0005
    while threading.get_ident() == me and time.perf_counter() < end:
        pass

def deep(n):
    return deep(n - 1) if n else sum(i for i in range(3))

def busy():
    while not stop:
        deep(700)

stop, kept = False, []
other = threading.Thread(target=busy, daemon=True)
other.start()
gc.callbacks.append(while_collecting)
gc.set_threshold(7, 10**6, 10**6)
end = time.monotonic() + 4
while time.monotonic() < end:
    with walking():
        frame, found = sys._current_frames()[other.ident], []
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
    kept.append(found)
    if len(kept) > 50:
        for frame in kept.pop(0):
            frame.f_back, frame.f_lineno
    time.sleep(0)
stop = True
other.join()
print("walked")
"""


def test_walking_the_stack_of_a_busy_thread_crashes_nothing() -> None:
    """Four seconds of walks, a collection at every seventh object: CPython 3.11 dies of that where nothing rests."""
    ran = subprocess.run([sys.executable, "-c", WALKS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "walked\n"), ran.stderr[-2000:]


def test_the_collector_goes_on_as_it_was() -> None:
    """After a walk the collector is enabled again, and stays disabled where the app wants it so."""
    assert gc.isenabled()
    with walking():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with walking():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_child_that_is_forked_during_a_walk_collects_and_walks() -> None:
    """The walk belongs to a thread that the child does not have: its lock is free there, and the collector on."""
    with walking():
        child = os.fork()
        if child == 0:
            free = foreign_frames._rests._lock.acquire(blocking=False)
            os._exit(0 if gc.isenabled() and free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
