"""Bar charts, line charts and notes as panels of one SVG figure.

The background is transparent, and text and grid are mid-gray, so that the figure is readable on light and dark pages.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_COLOR, GRID_COLOR = "#7d8590", "#7d859055"
PANEL_WIDTH, PANEL_HEIGHT = 6.0, 3.6  # inches
RC_PARAMS: dict[Any, Any] = {
    "font.size": 10,
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": GRID_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "grid.color": GRID_COLOR,
    "figure.constrained_layout.w_pad": 0.15,  # inches; viewers without the font need some more space
    "figure.constrained_layout.h_pad": 0.08,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "benchmarks",  # equal measurements give equal bytes
}


@dataclass(frozen=True)
class Style:
    """The look of an engine under test; the colors are legible on white and on near-black."""

    color: str
    dashed: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Series:
    """The points of one engine under test, from left to right."""

    name: str
    points: list[tuple[float, float]]
    style: Style


Panel = Callable[["Axes"], None]
"""A function that draws into its part of the figure."""


def render_svg(title: str, panels: Sequence[Panel], columns: int = 2) -> str:
    """Return an SVG figure with the panels side by side in rows."""
    # A late import: measuring works without matplotlib, which the extra `bench` installs.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(RC_PARAMS):
        figure = Figure(figsize=(columns * PANEL_WIDTH, rows * PANEL_HEIGHT), layout="constrained")
        parts = figure.subfigures(rows, columns, squeeze=False).flat
        for panel, part in zip(panels, parts, strict=False):
            panel(part.subplots())
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Title": title, "Date": None})
    return svg.getvalue()


def bar_panel(title: str, x_label: str, bars: list[tuple[str, float, Style]]) -> Panel:
    """Return a panel of horizontal bars, each with its name and its value."""

    def draw(ax: Axes) -> None:
        _set_title(ax, title)
        ax.set_xlabel(x_label)
        for index, (name, value, style) in enumerate(bars):
            ax.barh(index, value, color=style.color, alpha=0.55 if style.dashed else 1.0)
            _label_bar(ax, f"{value:.1f}", (value, index), style, offset=4, alignment="left")
            _label_bar(ax, name, (0, index), style, offset=-6, alignment="right")
        ax.set_yticks([])
        ax.invert_yaxis()
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.margins(x=0.12)

    return draw


def line_panel(title: str, x_label: str, y_label: str, series: list[Series], *, logarithmic: bool = False) -> Panel:
    """Return a panel of lines over a doubling x-axis; the legend lists them from the highest last value down."""

    def draw(ax: Axes) -> None:
        from matplotlib.ticker import LogLocator  # late, as in render_svg

        _set_title(ax, title)
        ax.set_xscale("log", base=2)
        ticks = sorted({x for one in series for x, _ in one.points})
        ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        if logarithmic:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            ax.yaxis.set_major_formatter("{x:g}")
        for one in sorted(series, key=lambda one: -one.points[-1][1]):
            style = one.style
            ax.plot(
                *zip(*one.points, strict=True),
                label=one.name,
                color=style.color,
                marker="o",
                markersize=4,
                linestyle="--" if style.dashed else "-",
                linewidth=2.6 if style.bold else 1.6,
            )
        if not logarithmic:
            ax.set_ylim(bottom=0)
        ax.minorticks_off()
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        ax.grid(visible=True, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor="linecolor")

    return draw


def notes_panel(title: str, lines: Sequence[str]) -> Panel:
    """Return a panel of text lines."""

    def draw(ax: Axes) -> None:
        _set_title(ax, title)
        ax.set_axis_off()
        ax.text(0, 0.97, "\n".join(lines), transform=ax.transAxes, va="top", linespacing=1.5)

    return draw


def _set_title(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", weight="bold")


def _label_bar(
    ax: Axes, text: str, position: tuple[float, float], style: Style, *, offset: int, alignment: str
) -> None:
    ax.annotate(
        text,
        position,
        (offset, 0),
        textcoords="offset points",
        color=style.color,
        weight="bold" if style.bold else "normal",
        va="center",
        ha=alignment,
    )
