"""Many writers, many restarts and hostile clients, in small numbers; ``tests/soak`` has the large ones."""

from __future__ import annotations

from pathlib import Path

from tests.support import proofs
from tests.support.hostile_app import measured_app


def test_no_increment_is_lost_by_threads_of_several_processes(tmp_path: Path) -> None:
    """8 threads in each of 4 processes count under the eyes of a reader: every read is sound, the end is exact."""
    assert proofs.prove_exact_counts(tmp_path, processes=4, threads=8, increments=5_000) > 5


def test_restarts_under_readers_leave_the_files_of_those_who_ran_at_once(tmp_path: Path) -> None:
    """400 restarts, in order or as if killed, of 4 workers leave 4 slots and every count, and no read saw less."""
    assert proofs.prove_restarts_leave_nothing(tmp_path, restarts=400, workers=4) > 50


def test_hostile_clients_make_no_series() -> None:
    """10,000 requests of which no method, path, host or header repeats add nothing to what the first ones made."""
    with measured_app() as measured:
        before, added = proofs.prove_hostile_clients_make_no_series(measured.app, measured.writer, requests=10_000)
    assert before < 300  # methods that exist, times the few routes of the app
    assert added <= 5
