"""Counts the bytecodes of Python that one request takes, ours apart: what a change costs, whatever the machine.

python -m benchmarks.bytecodes [--routes N] [--traced]

The clock is one that goes by two microseconds each time it is asked, so a slow run takes the same way as a fast one.
Prints a JSON object: bytecodes per request by file of fastapi_headroom, and of ``everything``.
"""

from __future__ import annotations

import itertools
import time

time.perf_counter = itertools.count(1000.0, 2e-6).__next__  # before anybody takes it by name

import argparse  # noqa: E402
import asyncio  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402
from pathlib import PurePath  # noqa: E402
from types import FrameType  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.apps import make_app  # noqa: E402
from fastapi_headroom import holds  # noqa: E402

WARM, COUNTED = 50, 20
"""Requests that are served before, and that are counted."""
OURS = "fastapi_headroom"


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routes", type=int, default=0, help="further routes before the one that is called")
    parser.add_argument("--traced", action="store_true", help="with tracing on, and no request sampled")
    arguments = parser.parse_args()
    counted = asyncio.run(count("headroom, tracing 0 %" if arguments.traced else "headroom", arguments.routes))
    json.dump(counted, sys.stdout, indent=1, sort_keys=True)


async def count(variant: str, routes: int) -> dict[str, float]:
    """Return the bytecodes of a request of ``/ping``, by file."""
    app = make_app(variant, routes)
    found: Counter[str] = Counter()

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            found[frame.f_code.co_filename] += 1
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    async def counted() -> None:
        holds.until = 0.0  # a loop that counts is late all the time, and this one is to be taken for an idle one
        sys.settrace(enter)
        try:
            await call(app)  # in one step: nobody else's bytecodes come in between
        finally:
            sys.settrace(None)

    for _ in range(WARM):
        await asyncio.create_task(call(app))
    for _ in range(COUNTED):
        await asyncio.create_task(counted())
    by_file: Counter[str] = Counter({"everything": sum(found.values())})
    for name, number in found.items():
        parts = PurePath(name).parts
        if OURS in parts:
            by_file["/".join(parts[parts.index(OURS) + 1 :])] += number
    return {name: number / COUNTED for name, number in by_file.items()}


async def call(app: Any) -> None:
    """Call ``/ping`` as a server does."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": "/ping", "raw_path": b"/ping", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    await app(scope, receive, send)
    if sent != ["http.response.start", "http.response.body"]:
        raise RuntimeError(f"/ping answered {sent}")


if __name__ == "__main__":
    main()
