"""The loop probe's long proofs, with the numbers that are promised. ``make soak`` runs them."""

from __future__ import annotations

import pytest

from tests.probes.loops import RUNS
from tests.support import loop_proofs

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("loop", list(RUNS))
def test_1000_of_1000_blocks_are_noticed(loop: str) -> None:
    """1,000 blocks of 100 ms at random, asleep, in Python and in C with the GIL kept: all noticed, none more."""
    assert RUNS[loop](loop_proofs.notices_blocks(1000)) == (1000, 0)


@pytest.mark.parametrize("loop", list(RUNS))
def test_600_of_600_blocks_are_noticed_at_rest(loop: str) -> None:
    """So are 600 blocks of a loop on which nothing else happens, and whose heartbeat rests."""
    assert RUNS[loop](loop_proofs.notices_blocks_at_rest(600)) == (600, 0)


@pytest.mark.parametrize("loop", list(RUNS))
def test_two_minutes_of_many_short_steps_under_contention_are_no_block(loop: str) -> None:
    """Two minutes of tasks that step without a pause, beside two processes that take the CPU, blame no code."""
    with loop_proofs.contention(processes=2):
        assert RUNS[loop](loop_proofs.blamed_while_busy(120)) == {}
