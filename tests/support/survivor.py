"""An app that brings faults upon itself, for tests of what survives them.

``SURVIVOR_CLOCK=jumps`` makes the wall clock of the process leap by days; ``SURVIVOR_DIES=answered`` ends the
process by SIGKILL as soon as the last byte of an answer to ``/last`` has been handed to the server.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import time
from typing import Any

from fastapi import FastAPI, Response

import fastapi_headroom as headroom

if os.environ.get("SURVIVOR_CLOCK") == "jumps":
    real, leaps = time.time, [0.0, -86_400.0, 3e8, -3e8]

    def jumping() -> float:
        leaps.append(leaps.pop(0))
        return real() + leaps[0]

    time.time = jumping

measured = FastAPI()
children: list[multiprocessing.process.BaseProcess] = []


@measured.get("/ping")
async def ping() -> dict[str, int]:
    return {"pid": os.getpid()}


@measured.get("/last")
async def last(status: int = 200) -> Response:
    return Response("bye", status_code=status)


@measured.get("/gil")
async def gil(seconds: float) -> None:
    """Hold the GIL in one C call."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@measured.get("/block")
async def block(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251 - the fault


@measured.get("/sleep")
async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


def linger() -> None:
    """Be a forked child that outlives its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(60)


@measured.get("/fork")
async def fork() -> dict[str, int]:
    child = multiprocessing.get_context("fork").Process(target=linger)
    child.start()
    children.append(child)
    return {"child": child.pid or 0}


def page(number: int) -> Any:
    async def handler() -> int:
        return number

    return handler


for number in range(60):
    measured.get(f"/pages/{number}")(page(number))

headroom.init(measured)


async def dying(scope: Any, receive: Any, send: Any) -> None:
    """Serve, and die after the last answer."""

    async def send_and_die(message: Any) -> None:
        await send(message)
        if scope["path"] == "/last" and message["type"] == "http.response.body" and not message.get("more_body"):
            os.kill(os.getpid(), signal.SIGKILL)

    await measured(scope, receive, send_and_die if scope["type"] == "http" else send)


app: Any = dying if os.environ.get("SURVIVOR_DIES") == "answered" else measured
