"""Real worker processes for the tests of the store."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPT = Path(__file__).with_name("worker_process.py")


class Worker:
    """A process with a writer on a directory. ``slot`` is the one that it claimed."""

    def __init__(self, directory: Path, *, file_size_limit: int | None = None) -> None:
        limit = [] if file_size_limit is None else [str(file_size_limit)]
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), *limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"},
        )
        self.slot = int(self._line())

    def ask(self, expression: str) -> Any:
        """Evaluate an expression over there; what it returns must be a literal."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return ast.literal_eval(self._line())

    def kill(self) -> str:
        """Kill it the hard way and return what it logged."""
        self.process.kill()
        _, errors = self.process.communicate(timeout=10)
        return errors

    def _line(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10)
            raise AssertionError(f"the worker ended with {self.process.returncode}:\n{self.process.stderr.read()}")
        return line

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
