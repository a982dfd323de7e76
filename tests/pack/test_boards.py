"""The boards keep their common rules."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.pack import support

UIDS = {f"headroom-{stem}" for stem in ("overview", "request", "pool", "cache", "loop", "queue", "runtime")}
each_board = pytest.mark.parametrize("board", support.BOARDS, ids=lambda board: board.stem)


def test_every_stem_has_its_board() -> None:
    """There is one board per stem and an overview, each under its stable uid."""
    assert {support.load(board)["uid"] for board in support.BOARDS} == UIDS
    assert all(support.load(board)["uid"] == board.stem for board in support.BOARDS)


@each_board
def test_queries_name_only_the_catalog(board: Path) -> None:
    """No panel, annotation or variable asks for a series that no probe writes."""
    known = support.metric_names()
    for expression in support.expressions(board):
        assert support.names_in(expression) - known == set(), expression
    for variable in support.load(board)["templating"]["list"]:
        if variable["type"] == "query":
            assert re.match(r"label_values\(([a-z_]+)", variable["query"]["query"])[1] in known


@each_board
def test_queries_are_valid(board: Path, tmp_path: Path) -> None:
    """Prometheus' own parser accepts every query of the board, once Grafana has put its variables in."""
    filled = [
        expression.replace("$__rate_interval", "5m").replace("$__range", "1h").replace("$__interval", "1m")
        for expression in support.expressions(board)
    ]
    rules = [{"record": f"query_{i}", "expr": expression} for i, expression in enumerate(filled)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": board.stem, "rules": rules}]}), encoding="utf-8")
    command = [support.tool("promtool"), "check", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_board
def test_panels_say_what_they_answer(board: Path) -> None:
    """Every panel has a title, a unit, and a description with the question that it answers."""
    for panel in support.panels(board):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit"), panel["title"]
        assert "?" in panel.get("description", ""), panel["title"]


@each_board
def test_titles_on_a_board_differ(board: Path) -> None:
    """No two panels of a board bear the same title, so people can talk about them."""
    titles = [panel["title"] for panel in support.panels(board)]
    assert len(titles) == len(set(titles))


@each_board
def test_panels_are_placed(board: Path) -> None:
    """Panel ids are unique; panels lie within the 24 columns and never overlap."""
    placed = support.load(board)["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    boxes = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"]) for p in placed]
    assert all(x >= 0 and w > 0 and h > 0 and x + w <= 24 for x, _, w, h in boxes)
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


@each_board
def test_the_data_source_is_a_variable(board: Path) -> None:
    """Every panel, query, annotation and variable uses the data source that the reader chose."""
    data = support.load(board)
    assert data["templating"]["list"][0]["type"] == "datasource"
    sources = [panel["datasource"] for panel in support.panels(board)]
    sources += [target["datasource"] for panel in support.panels(board) for target in panel["targets"]]
    sources += [entry["datasource"] for entry in data["annotations"]["list"]]
    sources += [entry["datasource"] for entry in data["templating"]["list"][1:]]
    assert all(source["uid"] == "${datasource}" for source in sources)
    assert "__inputs" not in data


@each_board
def test_common_settings(board: Path) -> None:
    """Boards show the last hour, refresh every 30 s, share the crosshair, and cannot be edited by accident."""
    data = support.load(board)
    assert data["tags"] == ["headroom"]
    assert (data["time"], data["refresh"]) == ({"from": "now-1h", "to": "now"}, "30s")
    assert data["graphTooltip"] == 1
    assert data["editable"] is False
    assert data["panels"][0]["title"] == "Is it bad?"
    (link,) = data["links"]
    assert (link["type"], link["tags"], link["asDropdown"]) == ("dashboards", ["headroom"], True)
    assert link["keepTime"] and link["includeVars"] and "placement" not in link
    assert [entry["name"] for entry in data["annotations"]["list"]] == ["Alerts", "Restarts", "Deploys"]


@each_board
def test_variables_reach_the_queries(board: Path) -> None:
    """Every query on our metrics follows job and instance; every other variable is used by some query."""
    names = [variable["name"] for variable in support.load(board)["templating"]["list"][1:]]
    assert names[:2] == ["job", "instance"]
    for expression in support.expressions(board):
        if support.names_in(expression) - support.OF_PROMETHEUS:
            assert '=~"$job"' in expression and '=~"$instance"' in expression, expression
    everything = " ".join(support.expressions(board))
    assert all(f'=~"${name}"' in everything for name in names)


@each_board
def test_rates_follow_the_interval(board: Path) -> None:
    """Rates use $__rate_interval or the time shown; only objectives and slopes name a window. Never irate."""
    for panel in support.panels(board):
        for target in panel["targets"]:
            assert "irate" not in target["expr"]
            windows = set(re.findall(r"\[([0-9]+[smhdw]|\$\w+)\]", target["expr"]))
            fixed = windows - {"$__rate_interval", "$__range"}
            assert (
                not fixed or "objective" in panel["description"] or "budget" in panel["description"] or fixed == {"30m"}
            )


@each_board
def test_links_lead_to_boards_that_exist(board: Path) -> None:
    """A link from a panel or a cell leads to one of these boards and keeps time, data source, job and instance."""
    for address in re.findall(r'"url": "(/d/[^"]+)"', board.read_text(encoding="utf-8")):
        uid = address.removeprefix("/d/").partition("?")[0]
        assert uid in UIDS or uid == "${__data.fields.Board}"
        assert all(f"${{{name}:queryparam}}" in address for name in ("datasource", "job", "instance"))
        assert "${__url_time_range}" in address
