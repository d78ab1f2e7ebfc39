"""Dashboards in Grafana's file format, by way of Grafana's own SDK."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from data_pipeline.cache import write_bytes
from data_pipeline.errors import Problem, UserError, missing_extra
from hopescale.dashboards.boards import MARKS
from hopescale.dashboards.compose import FILTERS, Heading, Layout, PlacedPanel, compose, filtered
from hopescale.dashboards.panel import COLUMNS, Mark, Panel
from hopescale.metrics.catalog import CATALOG, by_key
from hopescale.metrics.metric import Metric

TAG = "hopescale"
PLUGINS = {"stat": "stat", "lines": "timeseries", "bars": "timeseries", "gauges": "bargauge", "table": "table"}
"""Grafana's panel plugin by kind."""


def write_dashboards(folder: Path, catalog: Sequence[Metric] = CATALOG) -> list[Path]:
    """Write a file for each dashboard; equal catalogs give equal bytes.

    Args:
        folder: an existing one, for example `ops/grafana/dashboards`.
        catalog: the metrics to show.

    Returns:
        The files.

    Raises:
        UserError: there is no such folder.
        MissingExtra: Grafana's SDK is not installed.
    """
    if not folder.is_dir():
        rule = "must be an existing folder"
        raise UserError(Problem("folder", folder, rule, "make it, or start in the folder of the project"))
    paths = []
    for layout in compose(catalog):
        path = folder / f"{layout.board.uid}.json"
        write_bytes(path, dashboard_json(layout).encode())
        paths.append(path)
    return paths


def dashboard_json(layout: Layout) -> str:
    """The content of one dashboard's file.

    Raises:
        MissingExtra: Grafana's SDK is not installed.
    """
    sdk = _sdk()
    return sdk.encoder.JSONEncoder(indent=2, sort_keys=True).encode(_dashboard(sdk, layout)) + "\n"


class _Sdk(NamedTuple):
    """Modules of grafana-foundation-sdk."""

    bargauge: ModuleType
    common: ModuleType
    dashboard: ModuleType
    encoder: ModuleType
    prometheus: ModuleType
    stat: ModuleType
    table: ModuleType
    timeseries: ModuleType


def _sdk() -> _Sdk:
    try:
        from grafana_foundation_sdk.cog import encoder
        from grafana_foundation_sdk.models import bargauge, common, dashboard, prometheus, stat, table, timeseries
    except ImportError as error:
        raise missing_extra("grafana_foundation_sdk", "dev", "writing Grafana dashboards") from error
    return _Sdk(bargauge, common, dashboard, encoder, prometheus, stat, table, timeseries)


def _dashboard(sdk: _Sdk, layout: Layout) -> Any:
    models, board = sdk.dashboard, layout.board
    filters = (*FILTERS, *board.filters)
    return models.Dashboard(
        uid=board.uid,
        title=f"hopescale: {board.dashboard}",
        description=board.description,
        tags=[TAG],
        timezone="browser",
        graph_tooltip=models.DashboardCursorSync.CROSSHAIR,
        time=models.DashboardDashboardTime(from_val="now-3h", to="now"),
        refresh="30s",
        templating=models.DashboardDashboardTemplating(
            list_val=[_source_variable(sdk), *(_variable(sdk, name, filters) for name in filters)]
        ),
        annotations=models.AnnotationContainer(list_val=[_annotation(sdk, mark) for mark in MARKS]),
        links=[
            models.DashboardLink(
                title="hopescale",
                type_val=models.DashboardLinkType.DASHBOARDS,
                icon="external link",
                tags=[TAG],
                include_vars=True,
                keep_time=True,
            )
        ],
        panels=[_row(sdk, item) if isinstance(item, Heading) else _panel(sdk, item) for item in layout.items],
    )


def _source(sdk: _Sdk) -> Any:
    """The Prometheus chosen at the top of the dashboard."""
    return sdk.dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")


def _source_variable(sdk: _Sdk) -> Any:
    models = sdk.dashboard
    return models.VariableModel(
        type_val=models.VariableType.DATASOURCE,
        name="datasource",
        label="Prometheus",
        description="The data source that scrapes the runs.",
        query="prometheus",
    )


def _variable(sdk: _Sdk, name: str, filters: Sequence[str]) -> Any:
    """A choice among a label's values, narrowed by the choices before it."""
    models = sdk.dashboard
    # Every node has ranks, but only that of the first rank has figures of the whole run.
    metric = by_key("step" if name in FILTERS else "step_seconds").name
    selector = filtered(metric, filters[: filters.index(name)]).replace("{}", "")
    return models.VariableModel(
        type_val=models.VariableType.QUERY,
        name=name,
        label=name,
        description=f"Which {name}; several may be chosen.",
        datasource=_source(sdk),
        query=f"label_values({selector}, {name})",
        current=models.VariableOption(selected=True, text=["All"], value=["$__all"]),
        multi=True,
        include_all=True,
        # Matches series without the label too: a Prometheus with one run may not care to name it.
        all_value=".*",
        refresh=models.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=models.VariableSort.ALPHABETICAL_ASC,
    )


def _annotation(sdk: _Sdk, mark: Mark) -> Any:
    expression = filtered(mark.promql, FILTERS)
    return sdk.dashboard.AnnotationQuery(
        name=mark.name, datasource=_source(sdk), icon_color=mark.colour, expr=expression
    )


def _row(sdk: _Sdk, heading: Heading) -> Any:
    place = sdk.dashboard.GridPos(h=1, w=COLUMNS, x=0, y=heading.y)
    return sdk.dashboard.RowPanel(title=heading.title, id_val=heading.id, grid_pos=place)


def _panel(sdk: _Sdk, placed: PlacedPanel) -> Any:
    models, panel = sdk.dashboard, placed.panel
    return models.Panel(
        type_val=PLUGINS[panel.kind],
        id_val=placed.id,
        title=panel.title,
        description=panel.description,
        datasource=_source(sdk),
        grid_pos=models.GridPos(h=panel.height, w=panel.width, x=placed.x, y=placed.y),
        targets=[_target(sdk, panel, index) for index in range(len(panel.queries))],
        options=_options(sdk, panel),
        field_config=_fields(sdk, panel),
    )


def _target(sdk: _Sdk, panel: Panel, index: int) -> Any:
    query, formats = panel.queries[index], sdk.prometheus.PromQueryFormat
    newest = panel.asks_once(query)
    return sdk.prometheus.Dataquery(
        expr=query.promql,
        legend_format=query.legend,
        ref_id=chr(ord("A") + index),
        instant=newest,
        range_val=not newest,
        format_val=formats.TABLE if panel.kind == "table" else formats.TIME_SERIES,
        editor_mode=sdk.prometheus.QueryEditorMode.CODE,
        datasource=_source(sdk),
    )


def _options(sdk: _Sdk, panel: Panel) -> Any:
    common = sdk.common
    newest = common.ReduceDataOptions(calcs=["lastNotNull"])
    match panel.kind:
        case "stat":
            return sdk.stat.Options(
                graph_mode=common.BigValueGraphMode.NONE,
                color_mode=common.BigValueColorMode.VALUE,
                reduce_options=newest,
            )
        case "gauges":
            return sdk.bargauge.Options(
                reduce_options=newest,
                display_mode=common.BarGaugeDisplayMode.BASIC,
                orientation=common.VizOrientation.HORIZONTAL,
            )
        case "table":
            return sdk.table.Options()
    legend = common.VizLegendOptions(
        display_mode=common.LegendDisplayMode.LIST, placement=common.LegendPlacement.BOTTOM, show_legend=True, calcs=[]
    )
    tooltip = common.VizTooltipOptions(mode=common.TooltipDisplayMode.MULTI, sort=common.SortOrder.DESCENDING)
    return sdk.timeseries.Options(legend=legend, tooltip=tooltip)


def _fields(sdk: _Sdk, panel: Panel) -> Any:
    models = sdk.dashboard
    steps = [models.Threshold(value=number, color=colour) for number, colour in panel.colours]
    by_number = panel.kind == "stat"
    mode = models.FieldColorModeId.THRESHOLDS if by_number else models.FieldColorModeId.PALETTE_CLASSIC
    defaults = models.FieldConfig(
        unit=panel.unit,
        decimals=panel.decimals,
        min_val=panel.low,
        max_val=panel.high,
        color=models.FieldColor(mode=mode),
        thresholds=models.ThresholdsConfig(steps=steps or [models.Threshold(value=None, color="text")]),
        custom=_drawing(sdk, panel) if PLUGINS[panel.kind] == "timeseries" else None,
    )
    return models.FieldConfigSource(defaults=defaults, overrides=_hidden_columns(sdk) if panel.kind == "table" else [])


def _drawing(sdk: _Sdk, panel: Panel) -> Any:
    """How a time series is drawn."""
    common, bars = sdk.common, panel.kind == "bars"
    scale = common.ScaleDistribution.LOG if panel.logarithmic else common.ScaleDistribution.LINEAR
    stacking = common.StackingMode.PERCENT if panel.shares else common.StackingMode.NONE
    return common.GraphFieldConfig(
        draw_style=common.GraphDrawStyle.BARS if bars else common.GraphDrawStyle.LINE,
        line_width=1,
        fill_opacity=60 if bars or panel.shares else 8,
        show_points=common.VisibilityMode.AUTO,
        # A number that was not measured is a gap and no line between its neighbours.
        span_nulls=False,
        scale_distribution=common.ScaleDistributionConfig(type_val=scale, log=10 if panel.logarithmic else None),
        stacking=common.StackingConfig(mode=stacking, group="A"),
    )


def _hidden_columns(sdk: _Sdk) -> list[Any]:
    """A table of labels needs neither the moment nor the number nor the names that Prometheus adds."""
    models = sdk.dashboard
    return [
        models.DashboardFieldConfigSourceOverrides(
            matcher=models.MatcherConfig(id_val="byName", options=column),
            properties=[models.DynamicConfigValue(id_val="custom.hidden", value=True)],
        )
        for column in ("Time", "Value", "__name__", "instance", "job")
    ]
