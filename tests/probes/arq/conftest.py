"""These tests need arq, which lies in a folder of its own: ``tests/probes/test_queue_arq.py`` runs them with it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("arq") else ["test_*.py"]
