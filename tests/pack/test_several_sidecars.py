"""Several sidecars that poll one broker are one truth on the boards, as Prometheus itself computes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.pack import support

LABELS = 'messaging_system="redis", messaging_destination_name="mail"'
SERIES = {
    'headroom_queue_depth{%s, priority="0"}': "1000-5x60",
    'headroom_queue_depth{%s, priority="3"}': "7x60",
    'headroom_queue_oldest_age_seconds{%s, priority="0"}': "12x60",
    'headroom_queue_delayed{%s, priority="_all"}': "4x60",
    'headroom_queue_failed{%s, priority="_all"}': "2x60",
    'headroom_queue_in_progress{%s, priority="_all"}': "3x60",
    'headroom_queue_consumers{%s, priority="_all"}': "1x20 stale",
}
"""What one sidecar tells, every 15 s; the consumer dies after five minutes."""
QUEUE_BOARD = support.ROOT / "dashboards" / "headroom-queue.json"
VARIABLES = {"$job": ".+", "$instance": ".+", "$queue": ".+", "$__rate_interval": "1m", "$__range": "15m"}


def polled() -> list[tuple[str, str]]:
    """Return title and expression of every panel that reads what sidecars poll."""
    names = tuple(name.partition("{")[0] for name in SERIES)
    targets = [(panel["title"], target["expr"]) for panel in support.panels(QUEUE_BOARD) for target in panel["targets"]]
    return [(title, expression) for title, expression in targets if any(name in expression for name in names)]


def evaluate(folder: Path, expression: str, sidecars: int) -> str:
    """Return what promtool says the expression yields after 7 minutes."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    series = [
        {"series": name % f'job="shop", instance="{number}", {LABELS}', "values": values}
        for name, values in SERIES.items()
        for number in range(sidecars)
    ]
    # promtool shows what an expression yields when it is not what was expected.
    case = {"expr": expression, "eval_time": "7m", "exp_samples": [{"labels": "none", "value": -1}]}
    test = {"interval": "15s", "input_series": series, "promql_expr_test": [case]}
    file = folder / "boards.test.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run(
        [support.tool("promtool"), "test", "rules", file], capture_output=True, text=True, check=False
    )
    _, _, found = (done.stdout + done.stderr).partition("got:")
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize(("title", "expression"), polled(), ids=[title for title, _ in polled()])
def test_a_second_sidecar_changes_no_panel(title: str, expression: str, tmp_path: Path) -> None:
    """What one sidecar polls and what three do is the same number on the queue board."""
    one = evaluate(tmp_path, expression, 1)
    assert evaluate(tmp_path, expression, 3) == one
    assert "nil" not in one or title == "Time to drain", f"the panel {title} shows nothing"


def test_consumers_that_are_gone_are_drawn_as_none(tmp_path: Path) -> None:
    """After the last consumer's series has ended the panel says 0, and not nothing."""
    (expression,) = (expression for title, expression in polled() if title == "Consumers")
    assert float(evaluate(tmp_path, expression, 1).split()[-1]) == 0.0
