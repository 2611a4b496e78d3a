"""Draw charts by Bokeh, as JSON for the page's script, or by matplotlib, as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Literal

from tda_lightning.report.charts.charts import Chart, Histogram, Line, LineChart
from tda_lightning.report.page.html import Html
from tda_lightning.results.optional import needs

# Colours of the light page; the script of the page replaces them when it is dark.
COLORS = {"helped": "#1b62a5", "harmed": "#b3312a", "plain": "#1b62a5", "muted": "#6b7580"}


def bokeh_source() -> str:
    """Return the source of BokehJS, which a page needs once."""
    with needs("report"):
        from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", minified=True, components=["bokeh"]).js_raw)


def draw_bokeh(chart: Chart) -> dict[str, Any]:
    """Return a chart as a Bokeh document."""
    with needs("report"):
        from bokeh.embed import json_item

    plot = _bokeh_histogram(chart) if isinstance(chart, Histogram) else _bokeh_lines(chart)
    return dict(json_item(plot))


def _bokeh_lines(chart: LineChart) -> Any:
    from bokeh.models import Range1d

    plot = _bokeh_figure(chart, "linear")
    _add_lines(plot, chart.lines, chart.name)
    if chart.lowest is not None:
        plot.y_range = Range1d(start=chart.lowest, end=_upper_end(chart))
    return plot


def _bokeh_histogram(chart: Histogram) -> Any:
    plot = _bokeh_figure(chart, "log")
    source = _add_lines(plot, (chart.outline,), chart.name)
    plot.patches("xs", "ys", source=source, fill_color="color", line_color=None, alpha=0.25)
    return plot


def _bokeh_figure(chart: Chart, x_axis_type: Literal["linear", "log"]) -> Any:
    from bokeh.models import BasicTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        height=260,
        sizing_mode="stretch_width",
        x_axis_type=x_axis_type,
        tools="pan,box_zoom,reset",
        toolbar_location="above",
        x_axis_label=chart.x_label,
        y_axis_label=chart.y_label,
        min_border_right=16,
    )
    plot.yaxis.formatter = BasicTickFormatter(power_limit_low=-6)  # 0.003, not 3.000e-3
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    _calm_bokeh(plot)
    return plot


def _add_lines(plot: Any, lines: Sequence[Line], name: str) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool

    columns = {
        "xs": [line.x for line in lines],
        "ys": [line.y for line in lines],
        "color": [COLORS[line.role] for line in lines],
        "name": [line.name for line in lines],
    }
    source = ColumnDataSource(columns, name=f"{name}-lines")
    glyph = plot.multi_line("xs", "ys", source=source, line_color="color", line_width=2)
    plot.add_tools(HoverTool(renderers=[glyph], tooltips="@name", line_policy="interp"))
    return source


def _upper_end(chart: LineChart) -> float:
    return 1.1 * max(value for line in chart.lines for value in line.y) or 1


def _calm_bokeh(plot: Any) -> None:
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_alpha = 0.5
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "13px"
        axis.minor_tick_line_color = None


# Each stands for a colour of the page, which depends on whether it is light or dark.
_INK, _HELPED, _HARMED, _MUTED = "#010203", "#010204", "#010205", "#010206"
_PAGE_COLORS = {
    _INK: "currentColor",
    _HELPED: "var(--helped)",
    _HARMED: "var(--harmed)",
    _MUTED: "var(--muted)",
}
_ROLES = {"helped": _HELPED, "harmed": _HARMED, "plain": _HELPED, "muted": _MUTED}


def draw_svg(chart: Chart) -> Html:
    """Return a chart as an SVG element."""
    with needs("report"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    # Text stays text; equal charts have equal identifiers.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        figure = Figure(figsize=(4.8, 2.4), layout="constrained")
        axes = figure.add_subplot()
        if isinstance(chart, Histogram):
            _draw_histogram(axes, chart)
        else:
            _draw_lines(axes, chart)
        _calm_axes(axes)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Html(_themed(file.getvalue(), chart.name))


def _draw_lines(axes: Any, chart: LineChart) -> None:
    for line in chart.lines:
        axes.plot(line.x, line.y, color=_ROLES[line.role], linewidth=1.6)
    if chart.lowest is not None:
        axes.set_ylim(chart.lowest, _upper_end(chart))


def _draw_histogram(axes: Any, chart: Histogram) -> None:
    outline = chart.outline
    axes.plot(outline.x, outline.y, color=_ROLES[outline.role], linewidth=1.6)
    axes.fill_between(outline.x, outline.y, color=_ROLES[outline.role], alpha=0.25)
    axes.set_xscale("log")


def _calm_axes(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_INK)
    axes.tick_params(colors=_INK, which="both")
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)


def _themed(svg: str, name: str) -> str:
    """Return the element without prologue and size, with the page's colours, and ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    for color, replacement in _PAGE_COLORS.items():
        svg = svg.replace(color, replacement)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
