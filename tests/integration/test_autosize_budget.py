"""Workers that are autosized share a budget of connections: PostgreSQL itself never sees more."""

from __future__ import annotations

from pathlib import Path

from demo_app.stack.servers import Postgres
from tests.support.autosize_proofs import kill_at_random
from tests.support.autosize_worker import BUDGET


def test_killed_workers_never_take_more_than_the_budget(tmp_path: Path, postgres: Postgres) -> None:
    """Four workers, async and with threads, are killed under random demand: never over 12, and no connection lost."""
    outcome = kill_at_random(tmp_path, postgres, seconds=8, seed=1, kills_at_least=3)
    assert outcome.kills >= 3
    assert outcome.looks > 50
    assert outcome.most > BUDGET / 2, "they grew, and the budget was what they shared"
    assert all(used == closing == 0 for _, used, closing in outcome.places)
    assert sum(places for places, _, _ in outcome.places) >= outcome.open_at_rest >= 1
