"""Charts as data. The page's script (assets/charts.js) draws them with uPlot, at the width that the screen has.

The data of a chart is JSON in an attribute, so that nothing in it is read as markup. Colours are names of the page's style, which decides
on light and dark.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from w1train.reports.plot_data import Values, bucket_means, envelope, finite, padded_range, scientific, without_outliers
from w1train.runtime.quantities import quantity

_MAX_POINTS = 800
"""Points of a curve. Zooming shows no more of them, so this is twice as many as a telephone has pixels."""
_X_DIGITS, _Y_DIGITS = 12, 6

Format = Literal["general", "exact", "quantity", "percent", "scientific", "count"]
_FORMATS: dict[Format, Callable[[float], str]] = {
    "general": "{:.4g}".format,
    "exact": "{:.4f}".format,
    "quantity": quantity,
    "percent": "{:.1%}".format,
    "scientific": scientific,
    "count": "{:,.0f}".format,
}


@dataclass(slots=True, kw_only=True)
class Line:
    """One curve. ``xs`` ascend; None in ``ys`` is a gap."""

    xs: Sequence[float]
    ys: Values
    css: str
    """The name of the curve's colour."""
    name: str = ""
    """The name in the legend and beside the values under the pointer."""
    end: str = ""
    """The text of the curve's last value in the legend."""
    dots: bool = False
    """Draw a dot at every value."""
    raw: bool = False
    """Draw the values pale, behind a smoothed line; many values as a band between their extremes. The axis may leave outliers out."""


@dataclass(slots=True, frozen=True)
class Event:
    """An event of the run at ``x``."""

    x: float
    kind: Literal["restart", "checkpoint", "skipped"]


@dataclass(slots=True, frozen=True)
class Cells:
    """The cells of a heat map: ``columns[i]`` begins at ``edges[i]``, and has a value for each of ``rows``, which ascend."""

    edges: Sequence[float]
    columns: Sequence[Values]
    rows: Sequence[float]
    value_range: tuple[float, float]
    """The values of the weakest and of the strongest colour."""
    row_range: tuple[float, float] = (0.0, 1.0)
    """The ends of the vertical axis, which the rows divide into equal parts."""
    row_label: str = "t"

    def data(self) -> dict[str, Any]:
        """Return the cells as JSON values."""
        low, high = self.value_range
        columns = [_rounded(column) for column in self.columns]
        rows = {"rows": self.rows, "range": self.row_range, "label": self.row_label}
        return {"edges": _rounded(self.edges, _X_DIGITS), "columns": columns, **rows, "low": low, "high": high}


@dataclass(slots=True, kw_only=True)
class Chart:
    """Curves, or the cells of a heat map, over one horizontal axis; :meth:`figure` makes the element of the page."""

    title: str
    lines: list[Line]
    x_range: tuple[float, float]
    x_label: str = "step"
    height: int = 190
    log: bool = False
    """This flag tells whether the vertical axis is logarithmic at first; the page has a button that changes it."""
    from_zero: bool = False
    reference: tuple[float, str] | None = None
    """A horizontal line: (value, label)."""
    sections: Sequence[tuple[float, str]] = ()
    """(first x, name) of each section of the axis, which begins at a vertical line."""
    marks: Sequence[float] = ()
    """The x of NaN and infinite values, which are ticks on the axis."""
    events: Sequence[Event] = ()
    """A restart is a line, a checkpoint a tick on the axis, a skipped step a cross at the top."""
    cells: Cells | None = None
    format: Format = "general"
    """The name of the form in which values are written."""

    def text(self, value: float) -> str:
        """Write a value in the chart's form."""
        return _FORMATS[self.format](value)

    def figure(self, value: str = "", css: str = "", caption: str = "") -> str:
        """Return the chart with its caption.

        Args:
            value: text at the right of the title, such as the last value.
            css: a further class of the figure, for its width.
            caption: HTML that takes the place of ``value``.
        """
        data = html.escape(json.dumps(self._data(), separators=(",", ":"), allow_nan=False))
        shown = caption or html.escape(value)
        return (
            f'<figure class="{css}"><figcaption><b>{html.escape(self.title)}</b><span class="value">{shown}</span></figcaption>'
            f'{self._legend()}<div class="plot" data-chart="{data}"></div>{self._section_list()}</figure>'
        )

    def num_clipped(self) -> int:
        """Return the number of values outside the vertical axis."""
        low, high = self._y_range()
        return sum(not low <= value <= high for line in self.lines for value in _drawable(line.ys, self.log))

    def _legend(self) -> str:
        """Return the names of the curves with their colours, and their last values."""
        named = [line for line in self.lines if line.name]
        keys = "".join(
            f'<span class="key"><span class="dot {line.css}"></span>{html.escape(line.name)}'
            + (f" <b>{html.escape(line.end)}</b></span>" if line.end else "</span>")
            for line in named
        )
        if self.reference:
            keys += f'<span class="key"><span class="dash"></span>{html.escape(self.reference[1])}</span>'
        return f'<p class="keys">{keys}</p>' if named else ""

    def _section_list(self) -> str:
        """Return the numbered names of the sections: where a name has no room, the chart shows its number."""
        names = "".join(f'<li>{html.escape(name)} <span class="muted">from {begin:,.0f}</span></li>' for begin, name in self.sections)
        return f'<ol class="sections" aria-label="Stages">{names}</ol>' if names else ""

    def _data(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "title": self.title,
            "x": {"label": self.x_label, "range": self.x_range},
            "height": self.height,
            "format": self.format,
            **self._curves(),
            "log": self.log,
            "range": self._y_range(),
            "reference": self.reference,
            "sections": self.sections,
            "marks": [*((mark, "mark") for mark in self.marks), *((event.x, event.kind) for event in self.events)],
        }
        if self.cells is not None:
            parts["cells"] = self.cells.data()
        return {name: value for name, value in parts.items() if value}

    def _curves(self) -> dict[str, Any]:
        """Return the curves' styles, and their values in tables: lists of x, with the values of one or several curves in order."""
        styles: list[dict[str, Any]] = []
        tables: list[list[list[Any]]] = []
        for line in self.lines:
            for columns, style in _drawn(line):
                styles.append({"css": line.css, **style})
                if tables and tables[-1][0] == columns[0]:
                    tables[-1] += columns[1:]
                else:
                    tables.append(columns)
        return {"lines": styles, "tables": tables}

    def _y_range(self) -> tuple[float, float]:
        values = [self.reference[0]] if self.reference else []
        for line in self.lines:
            drawable = _drawable(line.ys, self.log)
            values += without_outliers(drawable) if line.raw else drawable
        return padded_range(values, self.log, self.from_zero)


def _drawn(line: Line) -> Iterator[tuple[list[list[Any]], dict[str, Any]]]:
    """Yield columns (x and values) and style of a line. Many raw values are two curves, of the largest and the smallest values: the page
    fills the band between them."""
    if line.raw and len(line.xs) > _MAX_POINTS:
        xs, lows, highs = envelope(line.xs, line.ys, _MAX_POINTS)
        yield [_rounded(xs, _X_DIGITS), _rounded(highs)], {"band": "high"}
        yield [_rounded(xs, _X_DIGITS), _rounded(lows)], {"band": "low"}
        return
    xs, ys = bucket_means(line.xs, line.ys, _MAX_POINTS)
    style = {"name": line.name, "dots": line.dots, "raw": line.raw}
    yield [_rounded(xs, _X_DIGITS), _rounded(ys)], {name: value for name, value in style.items() if value}


def _rounded(values: Values, digits: int = _Y_DIGITS) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}") for value in values]


def _drawable(ys: Values, log: bool) -> list[float]:
    """Return the values that the axis can hold."""
    return [value for value in finite(ys) if value > 0 or not log]
