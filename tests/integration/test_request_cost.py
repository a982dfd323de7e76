"""What a request executes of ours, counted in bytecodes: no machine makes it more or less."""

from __future__ import annotations

import sys

import pytest

from benchmarks.bench_bytecodes import counted

MOST, MOST_TRACED = 1050, 1250
"""Bytecodes of CPython 3.11 for a trivial request, without tracing and with it: a few in a hundred more than it is."""


@pytest.mark.parametrize("traced", [(), ("--traced",)], ids=["untraced", "not sampled"])
def test_further_routes_cost_a_request_nothing_of_ours(traced: tuple[str, ...]) -> None:
    """With 100 further routes a request executes exactly as many of our bytecodes as without."""
    few, everything = counted(*traced)
    many, _ = counted(*traced, "--routes", "100")
    assert few == many
    assert 0 < few < everything / 2
    if sys.version_info[:2] == (3, 11):
        assert few <= (MOST_TRACED if traced else MOST)
