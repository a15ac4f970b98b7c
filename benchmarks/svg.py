"""Charts as SVG, drawn without a library: lines that carry their names at the right end, and bars.

The picture has its own background, light or dark as the reader's system is, so that it is legible on any page.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 290  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 44, 132, 44, 40  # around the lines; names stand in the right margin
LINE_HEIGHT = 14
STYLE = """
  .paper { fill: #ffffff; stroke: #d0d7de } .title { fill: #1f2328; font-weight: 600; font-size: 14px }
  .note { fill: #59636e } .grid { stroke: #e4e8ec }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #151b23; stroke: #3d444d } .title { fill: #f0f6fc } .note { fill: #9198a1 } .grid { stroke: #2a313a }
  }
"""
FONT = 'font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="11.5"'


@dataclass(frozen=True)
class Look:
    """How a contender is drawn; the colours are legible on white and on near black."""

    colour: str
    dashed: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Series:
    """A contender's points, from left to right."""

    name: str
    points: list[tuple[float, float]]
    look: Look


@dataclass(frozen=True)
class Axis:
    """From data to pixels, with the ticks to show."""

    ticks: list[float]
    place: Callable[[float], float]


def document(title: str, charts: list[str], columns: int = 2) -> str:
    """Charts side by side in rows."""
    rows = -(-len(charts) // columns)
    width, height = columns * WIDTH + 20, rows * HEIGHT + 20
    placed = (
        f'<g transform="translate({10 + index % columns * WIDTH} {10 + index // columns * HEIGHT})">\n{chart}\n</g>'
        for index, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" {FONT}>\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(placed)
        + "\n</svg>\n"
    )


def line_chart(title: str, note: str, series: list[Series], *, logarithmic: bool = False) -> str:
    """Lines over an axis that doubles; `note` says what the axes are."""
    xs = sorted({x for one in series for x, _ in one.points})
    ys = [y for one in series for _, y in one.points]
    x_axis = _doubling(xs)
    y_axis = _logarithmic(min(ys), max(ys)) if logarithmic else _linear(max(ys))
    return "\n".join([*_head(title, note), *_grid(x_axis, y_axis), *_lines(series, x_axis, y_axis)])


def bar_chart(title: str, note: str, bars: list[tuple[str, float, Look]]) -> str:
    """Bars from the left, each with its name before and its value behind."""
    left, step = 138, (HEIGHT - TOP - 30) / max(len(bars), 1)
    longest = max(value for _, value, _ in bars)
    parts = list(_head(title, note))
    for index, (name, value, look) in enumerate(bars):
        middle = TOP + 14 + step * (index + 0.5)
        length = value / longest * (WIDTH - left - 70)
        parts.append(
            f'<rect x="{left}" y="{middle - step * 0.33:.1f}" width="{length:.1f}" height="{step * 0.66:.1f}" rx="2" '
            f'fill="{look.colour}" fill-opacity="{0.55 if look.dashed else 1}"/>'
        )
        parts.append(_text(left - 8, middle + 4, name, look.colour, bold=look.bold, anchor="end"))
        parts.append(_text(left + length + 6, middle + 4, f"{value:.1f}", look.colour, bold=look.bold))
    return "\n".join(parts)


def note_chart(title: str, lines: list[str]) -> str:
    """No chart but some lines of text."""
    rows = (
        f'<text class="note" x="8" y="{TOP + 12 + index * 18}">{escape(line)}</text>'
        for index, line in enumerate(lines)
    )
    return "\n".join([*_head(title, ""), *rows])


def spread(wanted: list[float], gap: float, limit: float) -> list[float]:
    """Places as near as can be to those wanted, which ascend up to the limit, and at least a gap apart."""
    blocks: list[tuple[float, int]] = []  # the middle of each block of touching labels, and how many they are
    for place in wanted:
        middle, count = place, 1
        while blocks and blocks[-1][0] + blocks[-1][1] * gap / 2 > middle - count * gap / 2:
            before, others = blocks.pop()
            middle = (before * others + middle * count) / (others + count)
            count += others
            middle = min(middle, limit - (count - 1) / 2 * gap)
        blocks.append((middle, count))
    return [middle + (index - (count - 1) / 2) * gap for middle, count in blocks for index in range(count)]


def _head(title: str, note: str) -> Iterator[str]:
    yield f'<text class="title" x="8" y="18">{escape(title)}</text>'
    yield f'<text class="note" x="8" y="34">{escape(note)}</text>'


def _grid(x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield f'<text class="note" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in x_axis.ticks:
        x, y = x_axis.place(tick), HEIGHT - BOTTOM + 18
        yield f'<text class="note" x="{x:.1f}" y="{y}" text-anchor="middle">{tick:,.0f}</text>'


def _lines(series: list[Series], x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    ordered = sorted(series, key=lambda one: y_axis.place(one.points[-1][1]))
    labels = spread([y_axis.place(one.points[-1][1]) for one in ordered], LINE_HEIGHT, HEIGHT - BOTTOM)
    for one, label in zip(ordered, labels, strict=True):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = ' stroke-dasharray="5 3"' if one.look.dashed else ""
        width = 2.6 if one.look.bold else 1.6
        yield f'<polyline points="{path}" fill="none" stroke="{one.look.colour}" stroke-width="{width}"{dashes}/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width}" fill="{one.look.colour}"/>' for x, y in places)
        x, y = places[-1]
        end = WIDTH - RIGHT + 14
        yield f'<path d="M{x + 4:.1f},{y:.1f} L{end - 3},{label:.1f}" stroke="{one.look.colour}" stroke-opacity="0.4"/>'
        yield _text(end, label + 4, one.name, one.look.colour, bold=one.look.bold)


def _text(x: float, y: float, text: str, colour: str, *, bold: bool, anchor: str = "start") -> str:
    weight = ' font-weight="700"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _doubling(values: list[float]) -> Axis:
    low, high = math.log2(values[0]), math.log2(values[-1])
    span = (high - low) or 1.0
    return Axis(values, lambda x: LEFT + 8 + (math.log2(x) - low) / span * (WIDTH - LEFT - RIGHT - 12))


def _linear(highest: float) -> Axis:
    rough = highest / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    top = math.ceil(highest / step) * step
    return Axis([step * index for index in range(round(top / step) + 1)], lambda y: _up(y / top))


def _logarithmic(lowest: float, highest: float) -> Axis:
    ladder = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 3)]
    first = max(index for index, value in enumerate(ladder) if value <= lowest)
    last = min(index for index, value in enumerate(ladder) if value >= highest)
    low, high = math.log(ladder[first]), math.log(ladder[last])
    return Axis(ladder[first : last + 1], lambda y: _up((math.log(y) - low) / ((high - low) or 1.0)))


def _up(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
