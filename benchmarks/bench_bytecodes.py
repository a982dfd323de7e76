"""What a request executes in bytecodes of Python: the same on every machine of one version of Python.

``/ping``, answered within one step of the loop; ours are those of fastapi_headroom's own files. The column "peer" is
all that the app executes for the request, ours included, with FastAPI's own telemetry standing aside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import serving
from benchmarks.measuring import Row, main

ROOT = Path(__file__).parents[1]
CASES = {
    "/ping": (),
    "/ping, 100 further routes": ("--routes", "100"),
    "/ping, tracing on, not sampled": ("--traced",),
    "/ping, tracing on, not sampled, 100 further routes": ("--traced", "--routes", "100"),
}


def benchmark(quick: bool) -> Iterator[Row]:
    """Yield ours and all of each case."""
    for what, arguments in CASES.items():
        ours, everything = counted(*arguments)
        yield Row(f"{what}: ours, and all", "bytecodes", ours, everything)


def counted(*arguments: str) -> tuple[float, float]:
    """Return how many bytecodes of a request are ours, and how many there are, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bytecodes", *arguments]
    with tempfile.TemporaryDirectory(prefix="headroom-bench-") as folder:
        env = serving.environment(Path(folder) / "store")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=env)
    by_file = json.loads(done.stdout)
    everything = by_file.pop("everything")
    return sum(by_file.values()), everything


if __name__ == "__main__":
    raise SystemExit(main(benchmark, __doc__ or ""))
