"""What may lie where a file of a store is expected, and is none."""

from __future__ import annotations

import os
from pathlib import Path


def a_pipe(path: Path) -> None:
    """Make a pipe, which holds up whoever opens it."""
    os.mkfifo(path)


def a_directory(path: Path) -> None:
    """Make a directory."""
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    """Make a link that leads nowhere."""
    path.symlink_to("/nothing/there")
