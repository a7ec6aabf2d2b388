"""Charts of horizontal bars, as SVG files for light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.axis import Scale, linear_ticks, tick_labels

_COLOURS = (
    *("#1b5e8c", "#c4541a", "#3d8b5f", "#8a63a8", "#b8922a", "#a03c4c", "#5b8fb0", "#78736a"),
    *("#d5d0c6", "#7fb39a", "#d99a6c", "#b79cc9"),
)
_BAR, _GAP, _HEADING, _TOP, _BOTTOM, _LEFT, _RIGHT, _WIDTH = 14, 5, 26, 44, 34, 190, 60, 860
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #78736a; } .end { text-anchor: end; } .middle { text-anchor: middle; }
.heading { font-weight: 600; fill: #1d1c1a; } .grid { stroke: #e7e3db; } .paper { fill: #fcfbf9; }
@media (prefers-color-scheme: dark) { .heading { fill: #e9e6e0; } .grid { stroke: #2c2e33; } .paper { fill: #131417; } }
"""


@dataclass(slots=True, frozen=True)
class Bar:
    """One bar: its label, and its pieces from left to right."""

    label: str
    pieces: Sequence[tuple[str, float]]
    """Names and values of the pieces. Pieces of one name have the same colour in all bars."""
    note: str = ""
    """Text after the end of the bar."""


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], unit: str) -> str:
    """Return a chart of groups of bars, each under its heading, over one axis from zero.

    Args:
        unit: the unit of the axis.
    """
    bars = [bar for _, members in groups for bar in members]
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.pieces))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    longest = max((sum(value for _, value in bar.pieces) for bar in bars), default=0.0) or 1.0
    x = Scale(0.0, 1.05 * longest, _LEFT, _WIDTH - _RIGHT)
    height = _TOP + len(groups) * _HEADING + len(bars) * (_BAR + _GAP) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(title)}">',
        f'<style>{_STYLE}</style><rect class="paper" width="{_WIDTH}" height="{height}"/>',
        *_legend(title, colours if any(len(bar.pieces) > 1 for bar in bars) else {}),
        *_axis(x, height - _BOTTOM, unit),
    ]
    y = _TOP
    for heading, members in groups:
        parts.append(f'<text class="heading" x="8" y="{y + 17}">{html.escape(heading)}</text>')
        y += _HEADING
        for bar in members:
            parts += _drawn(bar, x, y, colours)
            y += _BAR + _GAP
    return "\n".join([*parts, "</svg>\n"])


def _drawn(bar: Bar, x: Scale, y: int, colours: dict[str, str]) -> list[str]:
    parts = [f'<text class="end" x="{_LEFT - 8}" y="{y + 11}">{html.escape(bar.label)}</text>']
    at = 0.0
    for name, value in bar.pieces:
        width = x(at + value) - x(at)
        parts.append(f'<rect x="{x(at):.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colours[name]}"/>')
        at += value
    return [*parts, f'<text x="{x(at) + 6:.1f}" y="{y + 11}">{html.escape(bar.note)}</text>']


def _legend(title: str, colours: dict[str, str]) -> list[str]:
    parts = [f'<text class="heading" x="8" y="18">{html.escape(title)}</text>']
    left = 8
    for name, colour in colours.items():
        parts.append(f'<rect x="{left}" y="28" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + 14}" y="37">{html.escape(name)}</text>')
        left += 25 + round(6.5 * len(name))
    return parts


def _axis(x: Scale, bottom: int, unit: str) -> list[str]:
    ticks = linear_ticks(x.low, x.high, 8)
    parts = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="middle" x="{x(tick):.1f}" y="{bottom + 16}">{label}</text>')
    return [*parts, f'<text class="end" x="{x.end:.1f}" y="{bottom + 30}">{html.escape(unit)}</text>']
