"""The kinds of panels that boards are made of: one look, one place.

Each function returns a builder of grafana-foundation-sdk. ``question`` becomes the description: what the
panel answers, and what a rise means. Units are Grafana's ids (``s``, ``percentunit``, ``reqps``).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi_headroom.pack import palette
from fastapi_headroom.pack.sdk import (
    PromQueryFormat,
    bargauge,
    common,
    dashboard,
    heatmap,
    heatmap_model,
    prometheus,
    stat,
    table,
    timeseries,
)
from fastapi_headroom.pack.sdk import common_model as looks
from fastapi_headroom.pack.sdk import dashboard_model as model

DATASOURCE = looks.DataSourceRef(type_val="prometheus", uid="${datasource}")
Steps = Sequence[tuple[float | None, str]]
ZERO_IS_GOOD: Steps = ((None, palette.GOOD), (1e-9, palette.BAD))
PLAIN: Steps = ((None, palette.NEUTRAL),)


@dataclass(frozen=True, slots=True)
class Query:
    """One query; ``legend`` names its series, ``exemplar`` asks for exemplars beside it."""

    expression: str
    legend: str = ""
    exemplar: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: a query's value, its unit and, if steps are given, the colour of its cells."""

    title: str
    expression: str
    unit: str
    decimals: int | None = None
    steps: Steps = ()
    bar: bool = False
    link: str = ""


def board_link(uid: str, extra: str = "") -> str:
    """Return the address of a board that keeps time, data source, job and instance."""
    variables = "&".join(f"${{{name}:queryparam}}" for name in ("datasource", "job", "instance"))
    return f"/d/{uid}?${{__url_time_range}}&{variables}{extra}"


def lines(
    title: str,
    question: str,
    unit: str,
    *queries: Query,
    colours: Mapping[str, str] | None = None,
    stacked: bool = False,
    limits: Sequence[str] = (),
    legend: Literal["wide", "table", "list"] = "list",
    minimum: float | None = 0,
    maximum: float | None = None,
    decimals: int | None = None,
    zero: bool = True,
    board: str = "",
) -> timeseries.Panel:
    """Draw lines, or a stack. ``limits`` are legends drawn as dashed lines that never stack.

    ``zero`` makes the axis reach down to 0.
    """
    panel = timeseries.Panel().legend(_legend(legend)).tooltip(_tooltip())
    _common(panel, title, question, unit, queries, board)
    # Areas under many lines would add up to a grey mass: only a stack and a lone line are filled.
    alone = len(queries) - len(limits) == 1 and "{{" not in queries[0].legend
    panel.line_width(1).fill_opacity(60 if stacked else 8 if alone else 0).show_points(looks.VisibilityMode.NEVER)
    panel.span_nulls(60_000).color_scheme(_scheme(model.FieldColorModeId.PALETTE_CLASSIC))
    panel.gradient_mode(looks.GraphGradientMode.NONE).axis_border_show(False)
    if zero:
        panel.axis_soft_min(0)
    if stacked:
        panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
        panel.line_width(0)
    if minimum is not None:
        panel.min(minimum)
    if maximum is not None:
        panel.max(maximum)
    if decimals is not None:
        panel.decimals(decimals)
    for name, colour in (colours or {}).items():
        panel.override_by_name(name, [_colour(colour)])
    for name in limits:
        panel.override_by_name(
            name,
            [
                _colour((colours or {}).get(name, palette.LIMIT)),
                model.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
                model.DynamicConfigValue("custom.lineWidth", 1),
                model.DynamicConfigValue("custom.fillOpacity", 0),
                model.DynamicConfigValue("custom.stacking", {"mode": "none", "group": "limit"}),
            ],
        )
    return panel


def number(
    title: str,
    question: str,
    unit: str,
    query: str,
    *,
    steps: Steps = PLAIN,
    decimals: int | None = None,
    spark: bool = True,
    empty: str = "",
    board: str = "",
) -> stat.Panel:
    """Show one number. Without ``spark`` it is asked for once, at the end of the time range."""
    panel = stat.Panel()
    _common(panel, title, question, unit, (Query(query, title),), "", instant=not spark)
    panel.color_mode(looks.BigValueColorMode.VALUE).text_mode(looks.BigValueTextMode.VALUE)
    panel.graph_mode(looks.BigValueGraphMode.AREA if spark else looks.BigValueGraphMode.NONE)
    panel.justify_mode(looks.BigValueJustifyMode.CENTER)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel.thresholds(_steps(steps)).color_scheme(_scheme(model.FieldColorModeId.THRESHOLDS))
    if decimals is not None:
        panel.decimals(decimals)
    if empty:
        panel.no_value(empty)
    if board:
        # A link on the value leaves the title its room; an icon beside the title would not.
        panel.data_links([dashboard.DashboardLink("What explains it").url(board_link(board)).placement("")])
    return panel


def bars(
    title: str, question: str, unit: str, query: Query, *, steps: Steps, maximum: float | None = None, board: str = ""
) -> bargauge.Panel:
    """Show one horizontal bar per series, as of now."""
    panel = bargauge.Panel()
    _common(panel, title, question, unit, (query,), board, instant=True)
    panel.orientation(looks.VizOrientation.HORIZONTAL).display_mode(looks.BarGaugeDisplayMode.BASIC)
    panel.value_mode(looks.BarGaugeValueMode.COLOR).show_unfilled(True)
    panel.name_placement(looks.BarGaugeNamePlacement.LEFT).sizing(looks.BarGaugeSizing.MANUAL)
    panel.min_viz_height(16).max_viz_height(26).min_viz_width(8)
    panel.text(common.VizTextDisplayOptions().title_size(12).value_size(14))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel.thresholds(_steps(steps)).color_scheme(_scheme(model.FieldColorModeId.THRESHOLDS)).min(0)
    if maximum is not None:
        panel.max(maximum)
    return panel


def buckets(title: str, question: str, unit: str, query: str, *, exemplar: bool = False) -> heatmap.Panel:
    """Show the buckets of a histogram over time; ``query`` is a rate or increase by ``le``."""
    panel = heatmap.Panel()
    _common(panel, title, question, unit, (), "")
    target = _target(Query(query, "{{le}}", exemplar), "A", instant=False).format(PromQueryFormat.HEATMAP)
    panel.with_target(target).calculate(False).cell_gap(0).hide_legend()
    colours = heatmap.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.OPACITY).fill(palette.NEUTRAL)
    scale = heatmap_model.HeatmapColorScale.EXPONENTIAL
    panel.color(colours.scale(scale).exponent(0.4).steps(64).reverse(False))
    panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(looks.AxisPlacement.LEFT))
    panel.cell_values(heatmap.CellValues().unit("short").decimals(2))
    panel.filter_values(heatmap.FilterValueRange().le(1e-9))
    return panel


def listing(
    title: str,
    question: str,
    keys: Mapping[str, str],
    *columns: Column,
    sort: str = "",
    rising: bool = False,
    links: Mapping[str, str] | None = None,
    widths: Mapping[str, int] | None = None,
    hidden: Sequence[str] = (),
    colours: Mapping[str, Mapping[str, str]] | None = None,
) -> table.Panel:
    """Join columns on label keys (label to heading); each query gives one row per set of keys, as of now.

    ``links`` maps a key's heading to the address that its cells lead to; ``hidden`` columns feed such addresses;
    ``colours`` maps a key's heading to the colours of its values.
    """
    panel = table.Panel()
    _common(panel, title, question, columns[0].unit, (), "")
    letters = string.ascii_uppercase[: len(columns)]
    for letter, column in zip(letters, columns, strict=True):
        panel.with_target(_target(Query(column.expression), letter, instant=True).format(PromQueryFormat.TABLE))
    fields = [f"Value #{letter}" if len(columns) > 1 else "Value" for letter in letters]
    names = {**keys, **dict(zip(fields, (column.title for column in columns), strict=True))}
    panel.transformations(
        [
            model.DataTransformerConfig("merge", options={}),
            model.DataTransformerConfig("filterFieldsByName", options={"include": {"names": list(names)}}),
            model.DataTransformerConfig(
                "organize", options={"renameByName": names, "indexByName": {name: i for i, name in enumerate(names)}}
            ),
        ]
    )
    for column in columns:
        panel.override_by_name(column.title, _cell(column))
    for heading, address in (links or {}).items():
        link = {"title": "Show", "url": address, "targetBlank": False}
        panel.override_by_name(heading, [model.DynamicConfigValue("links", [link])])
    for heading, width in (widths or {}).items():
        panel.override_by_name(heading, [model.DynamicConfigValue("custom.width", width)])
    for heading in hidden:
        panel.override_by_name(heading, [model.DynamicConfigValue("custom.hidden", True)])
    for heading, values in (colours or {}).items():
        texts = {value: {"color": colour, "index": i} for i, (value, colour) in enumerate(values.items())}
        mapping = [{"type": "value", "options": texts}]
        cell = model.DynamicConfigValue("custom.cellOptions", {"type": "color-text"})
        panel.override_by_name(heading, [model.DynamicConfigValue("mappings", mapping), cell])
    if sort:
        panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(not rising)])
    return panel.cell_height(looks.TableCellHeight.SM).footer(common.TableFooterOptions().show(False))


def _cell(column: Column) -> list[model.DynamicConfigValue]:
    values = [model.DynamicConfigValue("unit", column.unit)]
    if column.decimals is not None:
        values.append(model.DynamicConfigValue("decimals", column.decimals))
    if column.steps:
        steps = [{"value": value, "color": colour} for value, colour in column.steps]
        values.append(model.DynamicConfigValue("thresholds", {"mode": "absolute", "steps": steps}))
        values.append(model.DynamicConfigValue("color", {"mode": "thresholds"}))
        values.append(model.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}))
    if column.link:
        link = {"title": "What explains it", "url": column.link, "targetBlank": False}
        values.append(model.DynamicConfigValue("links", [link]))
    if column.bar:
        values.append(
            model.DynamicConfigValue(
                "custom.cellOptions", {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"}
            )
        )
        values.append(model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": palette.NEUTRAL}))
        values.append(model.DynamicConfigValue("fieldMinMax", True))
        values.append(model.DynamicConfigValue("min", 0))
    return values


def _common(
    panel: Any, title: str, question: str, unit: str, queries: Sequence[Query], board: str, *, instant: bool = False
) -> None:
    panel.title(title).description(question).unit(unit).datasource(DATASOURCE)
    for letter, query in zip(string.ascii_uppercase, queries, strict=False):
        panel.with_target(_target(query, letter, instant=instant))
    if board:
        panel.links([dashboard.DashboardLink("What explains it").url(board_link(board)).placement("")])


def _target(query: Query, letter: str, *, instant: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(letter).expr(query.expression).datasource(DATASOURCE)
    target.legend_format(query.legend or "__auto")
    if query.exemplar:
        target.exemplar(True)
    return target.instant() if instant else target.range()


def _legend(kind: str) -> common.VizLegendOptions:
    """Return a list below; for ``table`` a table below, for ``wide`` one beside the graph: it needs half a board."""
    legend = common.VizLegendOptions().show_legend(True).placement(looks.LegendPlacement.BOTTOM)
    if kind == "list":
        return legend.display_mode(looks.LegendDisplayMode.LIST).calcs([])
    if kind == "wide":
        legend.placement(looks.LegendPlacement.RIGHT)
    legend.display_mode(looks.LegendDisplayMode.TABLE).calcs(["lastNotNull", "max"])
    return legend.sort_by("Last *").sort_desc(True)


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING)


def _scheme(mode: model.FieldColorModeId) -> dashboard.FieldColor:
    return dashboard.FieldColor().mode(mode)


def _colour(name: str) -> model.DynamicConfigValue:
    return model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": name})


def _steps(steps: Steps) -> dashboard.ThresholdsConfig:
    # The first step has no value: it is the colour below every bound.
    found = [model.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(found)
