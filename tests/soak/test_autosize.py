"""The long proofs of autosize. ``make soak`` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_app.stack.servers import Postgres
from tests.support.autosize_cancellations import cancel_at_random
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


async def test_ten_thousand_cancellations_under_autosize_leave_no_drift(tmp_path: Path, postgres: Postgres) -> None:
    """Of an autosized pool 10,000 checkouts are cancelled at random; at rest, used + idle is what the server has."""
    cancelled = await cancel_at_random(tmp_path, postgres, cancellations=10_000, seed=5)
    assert cancelled.held > 1_000, "while they held a connection"
    assert cancelled.waiting > 1_000, "while they waited for one"
    assert cancelled.changes > 3, "the limit moved meanwhile"
    assert (cancelled.used, cancelled.idle) == (0, cancelled.open_on_server)
    assert cancelled.places == cancelled.open_on_server >= 1
