"""The store's long proofs, with the numbers that are promised. ``make soak`` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import proofs
from tests.support.hostile_app import measured_app
from tests.support.serving import serve
from tests.support.survival import APP, counted, kill_workers_at_random

pytestmark = pytest.mark.soak


def test_no_increment_of_32_million_is_lost(tmp_path: Path) -> None:
    """8 threads in each of 4 processes make 1,000,000 increments and observations each, while a reader reads."""
    assert proofs.prove_exact_counts(tmp_path, processes=4, threads=8, increments=1_000_000) > 100


def test_10_000_restarts_leave_the_files_of_those_who_ran_at_once(tmp_path: Path) -> None:
    """10,000 restarts of 8 workers under two readers leave 8 slots and every count, and no read saw less."""
    assert proofs.prove_restarts_leave_nothing(tmp_path, restarts=10_000, workers=8) > 500


def test_1_000_000_hostile_requests_add_no_series() -> None:
    """A million requests of which nothing repeats add nothing to what the first ones made."""
    with measured_app() as measured:
        before, added = proofs.prove_hostile_clients_make_no_series(measured.app, measured.writer, requests=1_000_000)
    assert before < 300  # methods that exist, times the few routes of the app
    assert added <= 5


def test_workers_killed_for_a_minute_lose_no_answered_request() -> None:
    """gunicorn's workers are killed at random for a minute: every answer is counted, and nothing unasked is."""
    with serve("gunicorn", APP, workers=3) as server:
        clients, kills = kill_workers_at_random(server, seconds=60, seed=3)
        assert kills > 40
        assert clients.answered <= counted(server.directory) <= clients.asked
        assert len(list(server.directory.glob("slot*.lock"))) == 3
