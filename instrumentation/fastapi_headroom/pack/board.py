"""A board: variables, annotations, links, and rows whose panels are placed for you.

The SDK neither places panels nor numbers them, so both happen here, the same way on every run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.pack import promql
from fastapi_headroom.pack.panels import DATASOURCE
from fastapi_headroom.pack.sdk import JSONEncoder
from fastapi_headroom.pack.sdk import dashboard as builders
from fastapi_headroom.pack.sdk import dashboard_model as model

TAG = "headroom"
WIDTH = 24
SCHEMA = 39
"""Schema of Grafana 10; newer ones migrate it when they load it."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable that filters by one label, filled from a row of the catalog that carries it."""

    name: str
    metric: Metric
    label: str
    title: str
    everything: str = ".*"


JOB = Variable("job", catalog.SERIES, "job", "Job", ".+")
INSTANCE = Variable("instance", catalog.SERIES, "instance", "Instance", ".+")
WORKER = Variable("worker", catalog.PROCESS_MEMORY, "worker", "Worker")


@dataclass(frozen=True, slots=True)
class Cell:
    """A panel and its size: ``width`` of 24 columns, ``height`` in rows of 38 pixels."""

    panel: Any
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the cells below it, placed from left to right."""

    title: str
    cells: tuple[Cell, ...]


def across(height: int, *panels: Any) -> tuple[Cell, ...]:
    """Return cells that share the board's width equally."""
    width = WIDTH // len(panels)
    return tuple(Cell(panel, width, height) for panel in panels)


def build(uid: str, title: str, description: str, rows: Sequence[Row], variables: Sequence[Variable] = ()) -> str:
    """Return the board as JSON, the same text for the same input."""
    board = builders.Dashboard(title).uid(uid).description(description).tags([TAG]).readonly().timezone("browser")
    board.tooltip(model.DashboardCursorSync.CROSSHAIR).time("now-1h", "now").refresh("30s")
    board.with_variable(builders.DatasourceVariable("datasource").label("Source").type("prometheus"))
    known: list[str] = []
    for variable in (JOB, INSTANCE, *variables):
        board.with_variable(_variable(variable, known))
        known.append(f'{variable.label}=~"${variable.name}"')
    for annotation in _annotations():
        board.annotation(annotation)
    link = builders.DashboardLink("Headroom").type(model.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True)
    board.link(link.keep_time(True).include_vars(True).icon("external link").placement(""))
    built = board.build()
    built.schema_version = SCHEMA
    built.panels = _place(rows)
    data = json.loads(json.dumps(built, cls=JSONEncoder))
    return json.dumps(_clean(data), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def _place(rows: Sequence[Row]) -> list[model.Panel | model.RowPanel]:
    placed: list[model.Panel | model.RowPanel] = []
    top = 0
    for row in rows:
        heading = builders.Row(row.title).id(len(placed) + 1).build()
        heading.collapsed, heading.panels = False, []
        heading.grid_pos = model.GridPos(x=0, y=top, w=WIDTH, h=1)
        placed.append(heading)
        top, left, height = top + 1, 0, 0
        for cell in row.cells:
            if left + cell.width > WIDTH:
                top, left, height = top + height, 0, 0
            panel = cell.panel.build()
            panel.id_val = len(placed) + 1
            panel.grid_pos = model.GridPos(x=left, y=top, w=cell.width, h=cell.height)
            placed.append(panel)
            left, height = left + cell.width, max(height, cell.height)
        top += height
    return placed


def _variable(variable: Variable, known: Sequence[str]) -> builders.QueryVariable:
    matchers = [
        matcher for matcher in known if matcher.partition("=")[0] in {*variable.metric.labels, "job", "instance"}
    ]
    suffix = "_count" if variable.metric.kind == "histogram" else ""
    query = f"label_values({promql.series(variable.metric, *matchers, suffix=suffix)}, {variable.label})"
    built = builders.QueryVariable(variable.name).label(variable.title).datasource(DATASOURCE)
    built.query({"query": query, "refId": variable.name}).definition(query).multi(True).include_all(True)
    built.all_value(variable.everything).refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
    return built.sort(model.VariableSort.NATURAL_ASC)


def _annotations() -> list[builders.AnnotationQuery]:
    # Each marks a beginning: the series is there now and was not one step before.
    # A mark per step would shade the panels for as long as an alert fires.
    before = "offset $__interval"
    alerts = 'ALERTS{alertname=~"Headroom.+", alertname!="HeadroomWatchdog", alertstate="firing", job=~"$job"}'
    info = promql.shown(catalog.APP_INFO)
    versions = ("job", "service_name", "service_version")
    new = f"{promql.by('group', versions, info)} unless {promql.by('group', versions, f'{info} {before}')}"
    known = promql.by("group", ("job",), f"{info} {before}")
    count = promql.shown(catalog.WORKER_RESTARTS)
    return [
        _annotation(
            "Alerts", "red", f"{alerts} unless {alerts} {before}", "{{alertname}}", "{{severity}} {{instance}}"
        ),
        _annotation(
            "Restarts", "orange", f"{count} - {count} {before} > 0", "Worker restarted", "{{job}} {{instance}}"
        ),
        _annotation(
            "Deploys", "blue", f"({new}) and on (job) {known}", "Deploy", "{{service_name}} {{service_version}}"
        ),
    ]


def _annotation(name: str, colour: str, expression: str, title: str, text: str) -> builders.AnnotationQuery:
    query = builders.AnnotationQuery().name(name).datasource(DATASOURCE).enable(True).icon_color(colour)
    query.expr(expression).title_format(title).text_format(text).placement("")
    return query.step("15s").use_value_for_time(False)


def _clean(value: Any) -> Any:
    """Leave out empty placements: an older Grafana does not know them."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items() if not (key == "placement" and item == "")}
    return [_clean(item) for item in value] if isinstance(value, list) else value
