"""Charts as inline SVG, so that a report needs no other file and no network.

A chart is drawn for one width in CSS pixels, so that its text keeps its size. A page holds a wide chart at two widths, and shows the one
that fits. Colours are CSS classes: the page decides on light and dark.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from w1train.reports.plot_data import (
    Scale,
    Values,
    bucket_means,
    envelope,
    finite,
    linear_ticks,
    log_ticks,
    padded_range,
    spread,
    tick_labels,
    without_outliers,
)
from w1train.runtime.quantities import quantity

_MAX_POINTS = 400
_LABEL_HEIGHT = 15
_TOP, _BOTTOM, _LEFT, _RIGHT = 10, 26, 44, 10


@dataclass(slots=True, kw_only=True)
class Line:
    """One curve. ``xs`` ascend; None in ``ys`` is a gap."""

    xs: Sequence[float]
    ys: Values
    css: str
    label: str = ""
    """The text at the curve's right end; empty = no label."""
    dots: bool = False
    """Draw a dot at every value."""
    raw: bool = False
    """Draw the values pale, behind a smoothed line; many values as a band between their extremes. The axis may leave outliers out."""


@dataclass(slots=True, frozen=True)
class Event:
    """An event of the run at ``x``."""

    x: float
    kind: Literal["restart", "checkpoint", "skipped"]


@dataclass(slots=True, kw_only=True)
class Chart:
    """Curves over one horizontal axis; :meth:`svg` draws them at a width."""

    title: str
    lines: list[Line]
    x_range: tuple[float, float]
    x_label: str = "step"
    height: int = 190
    log: bool = False
    from_zero: bool = False
    reference: tuple[float, str] | None = None
    """A horizontal line: (value, label)."""
    label_width: int = 0
    """Pixels on the right for the labels of curves and reference."""
    sections: Sequence[tuple[float, str]] = ()
    """(first x, name) of each section of the axis, which begins at a vertical line."""
    marks: Sequence[float] = ()
    """The x of NaN and infinite values, which are ticks on the axis."""
    events: Sequence[Event] = ()
    """A restart is a line, a checkpoint a tick on the axis, a skipped step a cross at the top."""
    format: Callable[[float], str] = "{:.4g}".format
    """A function that returns the text of the value under the pointer."""
    hover_names: Sequence[str] = ()
    """The names of the curves, if the value of every curve is shown under the pointer; otherwise the last curve's is shown alone."""

    def svg(self, width: int) -> str:
        """Draw the chart, ``width`` pixels wide."""
        bottom = self.height - _BOTTOM
        x = Scale(*self.x_range, _LEFT, width - _RIGHT - self.label_width)
        y = Scale(*self._y_range(), bottom, _TOP, self.log)
        clip = re.sub(r"\W+", "-", f"clip {self.title} {width}")
        parts = [
            f'<svg class="chart" viewBox="0 0 {width} {self.height}" role="img" aria-label="{html.escape(self.title)}"{self._hover(x)}>',
            f'<clipPath id="{clip}">',
            f'<rect x="{_LEFT - 4}" y="{_TOP - 4}" width="{x.end - _LEFT + 8:.0f}" height="{bottom - _TOP + 8}"/>',
            "</clipPath>",
            *y_axis(y, _LEFT, x.end),
            *x_axis(x, bottom, self.x_label),
            f'<g clip-path="url(#{clip})">',
            *(_curve(line, x, y) for line in self.lines),
            "</g>",
            *self._sections(x, bottom),
            *(_event(event.kind, x(event.x), bottom) for event in self.events),
            *(f'<path class="mark" d="M{x(mark):.1f} {bottom}v-7"/>' for mark in self.marks),
            *self._labels(x, y),
            f'<path class="cross" d="M0 {_TOP}V{bottom}" visibility="hidden"/>',
            "</svg>",
        ]
        return "\n".join(parts)

    def _sections(self, x: Scale, bottom: float) -> Iterator[str]:
        for begin, name in self.sections:
            yield f'<path class="reference" d="M{x(begin):.1f} {_TOP}V{bottom}"/>'
            yield f'<text class="tick" x="{x(begin) + 4:.1f}" y="{_TOP + 9}">{html.escape(name)}</text>'

    def num_clipped(self) -> int:
        """Return the number of values outside the vertical axis."""
        low, high = self._y_range()
        return sum(not low <= value <= high for line in self.lines for value in _drawable(line.ys, self.log))

    def _y_range(self) -> tuple[float, float]:
        values = [self.reference[0]] if self.reference else []
        for line in self.lines:
            drawable = _drawable(line.ys, self.log)
            values += without_outliers(drawable) if line.raw else drawable
        return padded_range(values, self.log, self.from_zero)

    def _labels(self, x: Scale, y: Scale) -> list[str]:
        """Draw labels beside the curves' ends, moved apart where they would overlap."""
        parts, wanted = [], []
        for line in self.lines:
            drawable = _drawable(line.ys, self.log)
            if line.label and drawable:
                wanted.append((y(drawable[-1]), line.label, line.css))
        if self.reference:
            height = y(self.reference[0])
            parts.append(f'<path class="reference" d="M{_LEFT} {height:.1f}H{x.end:.1f}"/>')
            wanted.append((height, self.reference[1], "muted"))
        wanted.sort()
        positions = spread([height for height, _, _ in wanted], _LABEL_HEIGHT, _TOP, self.height - _BOTTOM)
        for position, (_, label, css) in zip(positions, wanted, strict=True):
            parts.append(f'<text class="label {css}" x="{x.end + 8:.1f}" y="{position + 4:.1f}">{html.escape(label)}</text>')
        return parts

    def _hover(self, x: Scale) -> str:
        """Return the texts that the page's script shows under the pointer, as an attribute of the chart."""
        if not self.lines:
            return ""
        curves = [_points(line) for line in (self.lines if self.hover_names else self.lines[-1:])]
        points = max(curves, key=len)
        texts = [f"{self._place(at)}: {self._values(at, curves)}" for at, _ in points]
        data = json.dumps([[round(x(at), 1) for at, _ in points], texts], separators=(",", ":"))
        return f' data-hover="{html.escape(data)}"'

    def _place(self, at: float) -> str:
        shown = {"step": f"{at:,.0f}", "tokens": quantity(at)}.get(self.x_label, f"{at:.3g}")
        return f"{self.x_label} {shown}"

    def _values(self, at: float, curves: list[list[tuple[float, float]]]) -> str:
        """Return the text of each curve's value nearest to ``at``."""
        if not self.hover_names:
            return self.format(min(curves[0], key=lambda point: abs(point[0] - at))[1])
        named = [(name, curve) for name, curve in zip(self.hover_names, curves, strict=True) if curve]
        found = [(name, min(curve, key=lambda point: abs(point[0] - at))[1]) for name, curve in named]
        return ", ".join(f"{name} {self.format(value)}" for name, value in found)


def _points(line: Line) -> list[tuple[float, float]]:
    xs, ys = bucket_means(line.xs, line.ys, _MAX_POINTS)
    return [(at, value) for at, value in zip(xs, ys, strict=True) if value is not None]


def _event(kind: str, x: float, bottom: float) -> str:
    if kind == "restart":
        return f'<path class="restart" d="M{x:.1f} {_TOP}V{bottom}"/>'
    if kind == "checkpoint":
        return f'<path class="checkpoint" d="M{x:.1f} {bottom - 6}l3.5 6h-7z"/>'
    return f'<path class="skipped" d="M{x - 3.5:.1f} {_TOP}l7 7m0 -7l-7 7"/>'


def heat_map(title: str, columns: list[Values], x_range: tuple[float, float], rows: Sequence[float], width: int, height: int = 250) -> str:
    """Draw columns of values over the steps, a row for each t, the lowest t at the bottom. A larger value has a stronger colour."""
    low, high = heat_range(columns)
    bottom = height - _BOTTOM
    x = Scale(*x_range, _LEFT, width - _RIGHT)
    cell_height = (bottom - _TOP) / len(rows)
    # Neighbours share an edge at a whole pixel: a gap of a hundredth of a pixel is a white line on some screens.
    edges = [round(_LEFT + (x.end - x.start) * index / max(1, len(columns))) for index in range(len(columns) + 1)]
    heights = [round(bottom - index * cell_height) for index in range(len(rows) + 1)]
    parts = [f'<svg class="chart heat" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for column_index, column in enumerate(columns):
        for row_index, value in enumerate(column):
            if value is None or not finite([value]):
                continue
            left, top = edges[column_index], heights[row_index + 1]
            opacity = 0.04 + 0.96 * (value - low) / (high - low)
            size = f'width="{edges[column_index + 1] - left}" height="{heights[row_index] - top}"'
            parts.append(f'<rect x="{left}" y="{top}" {size} fill-opacity="{opacity:.2f}"/>')
    for row_index, row in enumerate(rows):
        if len(rows) <= 6 or row_index in (0, len(rows) // 2, len(rows) - 1):
            middle = bottom - (row_index + 0.5) * cell_height
            named = f"t {row:.3g}" if row_index == len(rows) - 1 else f"{row:.3g}"
            parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{middle + 4:.1f}">{named}</text>')
    return "\n".join([*parts, *x_axis(x, bottom, "step"), "</svg>"])


def heat_range(columns: list[Values]) -> tuple[float, float]:
    """Return the values of the weakest and of the strongest colour."""
    values = without_outliers(finite(value for column in columns for value in column))
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def y_axis(y: Scale, left: float, right: float) -> list[str]:
    """Draw grid lines with their values."""
    max_ticks = max(2, round((y.start - y.end) / 34))
    ticks = log_ticks(y.low, y.high, max_ticks) if y.log else linear_ticks(y.low, y.high, max_ticks)
    parts = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(f'<path class="grid" d="M{left:.1f} {y(tick):.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick end" x="{left - 8:.1f}" y="{y(tick) + 4:.1f}">{label}</text>')
    return parts


def x_axis(x: Scale, height: float, label: str) -> list[str]:
    """Draw base line and ticks. The first tick has the name of the axis before its value."""
    whole_numbers = label == "step"
    ticks = linear_ticks(x.low, x.high, max(2, round((x.end - x.start) / 90)), integer=whole_numbers)
    parts = [f'<path class="axis" d="M{x.start:.1f} {height}H{x.end:.1f}"/>']
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        named = f"{label} {text}" if tick == ticks[0] else text
        anchor = " end" if x.end - x(tick) < 12 and tick != ticks[0] else " middle"
        anchor = "" if tick == ticks[0] and x(tick) - x.start < 20 else anchor
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {height}v4"/>')
        parts.append(f'<text class="tick{anchor}" x="{x(tick):.1f}" y="{height + 18}">{named}</text>')
    return parts


def _curve(line: Line, x: Scale, y: Scale) -> str:
    """Draw a line; for more raw values than there are pixels, the band between their extremes."""
    if line.raw and len(line.xs) > _MAX_POINTS:
        xs, lows, highs = envelope(line.xs, [value if value in _drawable([value], y.log) else None for value in line.ys], _MAX_POINTS)
        border = [*zip(xs, highs, strict=True), *reversed([*zip(xs, lows, strict=True)])]
        path = "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in border)
        return f'<path class="band {line.css}" d="M{path}Z"/>' if path else ""
    xs, ys = bucket_means(line.xs, line.ys, _MAX_POINTS)
    commands, points, pen_down = [], [], False
    for at, value in zip(xs, ys, strict=True):
        if value is None or not _drawable([value], y.log):
            pen_down = False
            continue
        points.append((x(at), y(value)))
        commands.append(f"{'L' if pen_down else 'M'}{x(at):.1f} {y(value):.1f}")
        pen_down = True
    if not points:
        return ""
    # A path of one point is invisible: a single value is a dot.
    dots = points if line.dots or len(points) == 1 else []
    circles = "".join(f'<circle cx="{at:.1f}" cy="{value:.1f}" r="3"/>' for at, value in dots)
    return f'<g class="curve {"raw " if line.raw else ""}{line.css}"><path d="{"".join(commands)}"/>{circles}</g>'


def _drawable(ys: Values, log: bool) -> list[float]:
    """Return the values that the axis can hold."""
    return [value for value in finite(ys) if value > 0 or not log]
