"""Sites and causes, from frames and figures made for the purpose."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from fastapi_headroom.probes.blame import Evidence, Sample, cause_of, depth_of, look_at, most_common, owner_of, site_of

NOTHING = Evidence(
    wall=1.0, cpu=0.0, ready=0.0, process_cpu=0.0, watchdog_late=0.0, collecting=0.0, waits_for_lock=False
)
IN_A_CALL = Sample("app:view:1", (1, 5, 40), in_call=True, waited=0.0, stack=())


@pytest.mark.parametrize(
    ("figures", "cause"),
    [
        ({"cpu": 0.9, "process_cpu": 0.9}, "python"),
        ({"cpu": 0.9, "process_cpu": 0.9, "watchdog_late": 0.9}, "native"),
        ({"cpu": 0.9, "process_cpu": 0.9, "collecting": 0.6}, "gc"),
        ({}, "io"),
        ({"waits_for_lock": True}, "io"),
        ({"process_cpu": 1.0}, "io"),
        ({"process_cpu": 1.0, "waits_for_lock": True}, "gil"),
        ({"process_cpu": 1.0, "waits_for_lock": None}, "gil"),
        ({"waits_for_lock": True, "wakes": 0.9}, "gil"),
        ({"waits_for_lock": None, "wakes": 0.9}, "gil"),
        ({"waits_for_lock": True, "wakes": 0.1}, "io"),
        ({"wakes": 0.9}, "io"),
        ({"process_cpu": 0.9, "watchdog_late": 0.9}, "gil"),
        ({"wakes": 0.9, "watchdog_late": 0.9}, "gil"),
        ({"watchdog_late": 0.9}, "starved"),
        ({"cpu": 0.3, "ready": 0.7, "process_cpu": 0.3}, "starved"),
        ({"cpu": 0.6, "ready": 0.4, "process_cpu": 0.6}, "python"),
    ],
)
def test_cause(figures: dict[str, Any], cause: str) -> None:
    """The cause is what took the largest part of the time."""
    assert cause_of(replace(NOTHING, **figures), []) == cause


@pytest.mark.parametrize(
    ("samples", "cause"),
    [
        ([IN_A_CALL, IN_A_CALL], "native"),
        ([IN_A_CALL], "python"),
        ([IN_A_CALL, replace(IN_A_CALL, position=(1, 5, 60))], "python"),
        ([IN_A_CALL] * 4 + [replace(IN_A_CALL, position=(1, 5, 60), in_call=False)], "native"),
        ([IN_A_CALL] * 3 + [replace(IN_A_CALL, position=(1, 5, 60), in_call=False)], "python"),
        ([replace(IN_A_CALL, waited=0.005)] * 3, "python"),
        ([replace(IN_A_CALL, in_call=False)] * 3, "python"),
    ],
)
def test_native_needs_one_call_and_a_free_gil(samples: list[Sample], cause: str) -> None:
    """CPU is native only when four samples of five stood in one call and nobody had to wait for the GIL."""
    assert cause_of(replace(NOTHING, cpu=0.9, process_cpu=0.9), samples) == cause


def test_site_is_the_deepest_frame_of_the_users_code() -> None:
    """The standard library's frames below a call are passed over; the line is the function's first."""
    seen: list[str] = []

    class Spy(dict[str, int]):
        def items(self) -> Any:
            frame: FrameType | None = sys._getframe(1)  # in json
            frames = []
            while frame is not None:
                frames.append(frame)
                frame = frame.f_back
            assert owner_of(frames[0].f_code.co_filename) == "stdlib"
            seen.append(site_of(frames))
            return super().items()

    def encode() -> None:
        json.dumps(Spy(a=1), indent=1)

    encode()
    name = "test_site_is_the_deepest_frame_of_the_users_code.encode"
    assert seen == [f"{__name__}:{name}:{encode.__code__.co_firstlineno}"]


def test_frames_that_run_the_loop_are_not_to_blame() -> None:
    """With all frames left out as the loop's own, what is left is the innermost alone."""
    frame = sys._getframe()
    assert len(look_at(frame, depth_of(frame)).sample.stack) == 1
    assert len(look_at(frame, depth_of(frame) - 2).sample.stack) == 2


class _ThreadSafeHandle:
    def _run(self) -> int:
        return depth_of(sys._getframe())


def test_frame_that_not_all_callbacks_have_is_none_below_them() -> None:
    """From Python 3.14 on asyncio runs what another thread asked for by one frame more than all else."""
    assert _ThreadSafeHandle()._run() == depth_of(sys._getframe())


@pytest.mark.parametrize(
    ("filename", "owner"),
    [
        (json.__file__, "stdlib"),
        ("<frozen importlib._bootstrap>", "stdlib"),
        (pytest.__file__, "library"),
        (look_at.__code__.co_filename, "ours"),
        (__file__, "user"),
        ("/srv/shop/app/main.py", "user"),
    ],
)
def test_owner(filename: str, owner: str) -> None:
    """Files belong to the standard library, installed packages, this package, or the user."""
    assert owner_of(filename) == owner


def test_library_is_blamed_when_no_user_code_is_on_the_stack() -> None:
    """An app whose own code is not on the stack still gets a site: the deepest frame of a library."""
    namespace: dict[str, Any] = {"__name__": "driver", "sys": sys}
    source = "def query():\n    return sys._getframe()"
    exec(compile(source, "/usr/lib/python3/dist-packages/driver.py", "exec"), namespace)
    assert site_of([namespace["query"]()]) == "driver:query:1"


def test_most_common_site() -> None:
    """The site of most samples wins, and one that is unknown never against one that is not."""
    unknown = replace(IN_A_CALL, site="unknown")
    assert most_common([unknown, unknown, IN_A_CALL]) == "app:view:1"
    assert most_common([unknown]) == most_common([]) == "unknown"
