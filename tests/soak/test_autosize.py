"""The long proof of autosize. ``make soak`` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_app.stack.servers import Postgres
from tests.support.autosize_proofs import kill_at_random
from tests.support.autosize_worker import BUDGET

pytestmark = pytest.mark.soak


def test_five_minutes_of_kills_stay_within_the_budget(tmp_path: Path, postgres: Postgres) -> None:
    """Four workers are killed at random for five minutes: PostgreSQL never sees more than the budget of 12."""
    outcome = kill_at_random(tmp_path, postgres, seconds=300, seed=2)
    assert outcome.kills > 60
    assert outcome.most > BUDGET / 2
    assert all(used == closing == 0 for _, used, closing in outcome.places)
    assert sum(places for places, _, _ in outcome.places) >= outcome.open_at_rest >= 1
