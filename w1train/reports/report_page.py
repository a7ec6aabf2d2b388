"""The fixed parts of report.html: its frame, style and script."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --ink: #1d1c1a; --muted: #78736a; --rule: #e7e3db; --soft: #f3f0ea;
  --accent: #1b5e8c; --second: #c4541a; --bad: #b3261e;
  --series-0: #1b5e8c; --series-1: #c4541a; --series-2: #2f7d4f; --series-3: #8a3ffc; --series-4: #b0851a; --series-5: #c0307a;
  --series-6: #3b9aa8; --series-7: #6b6660; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131417; --ink: #e9e6e0; --muted: #98948c; --rule: #2c2e33; --soft: #1b1d21;
    --accent: #71b4e3; --second: #f19a5f; --bad: #ff8a80;
    --series-0: #71b4e3; --series-1: #f19a5f; --series-2: #7fcf9d; --series-3: #c3a0ff; --series-4: #e3c15f; --series-5: #f58fc0;
    --series-6: #7fd6e0; --series-7: #b5b0a8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 20px 72px; }
h1 { font-size: 15px; font-weight: 600; margin: 0; }
h2 { font-size: 18px; font-weight: 600; margin: 56px 0 4px; letter-spacing: -0.01em; }
p { margin: 0; }
.muted, figcaption, .note { color: var(--muted); }
.note { font-size: 14px; max-width: 72ch; }
.headline { display: grid; gap: 28px 56px; margin: 28px 0 40px; align-items: end; }
.headline .number { font-size: 72px; line-height: 1; font-weight: 300; letter-spacing: -0.03em; }
.headline .unit { font-size: 18px; margin-top: 6px; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 10px 14px; align-items: center; font-size: 14px; }
.bars .track { display: flex; align-items: center; gap: 8px; }
.bars .bar { height: 10px; border-radius: 2px; background: var(--muted); opacity: .45; min-width: 2px; }
.bars .now { background: var(--accent); opacity: 1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 20px; margin: 0; padding: 20px 0;
  border-block: 1px solid var(--rule); }
.tiles dt { font-size: 13px; color: var(--muted); }
.tiles dd { margin: 2px 0 0; font-size: 20px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
.charts { display: grid; gap: 32px; margin-top: 20px; grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; margin-bottom: 4px; min-height: 20px; }
figcaption b { color: var(--ink); font-weight: 600; flex-shrink: 0; max-width: 100%; }
figcaption .value { text-align: right; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
svg text { font-size: 12px; fill: var(--muted); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--muted); stroke-opacity: .6; }
svg .reference { stroke: var(--muted); stroke-dasharray: 5 4; stroke-width: 1.25; }
svg .curve path { fill: none; stroke: currentColor; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
svg .curve circle { fill: currentColor; stroke: var(--paper); stroke-width: 1.5; }
svg .band { fill: currentColor; fill-opacity: .2; stroke: none; }
svg .raw path { stroke-width: 1; stroke-opacity: .3; }
svg .label { font-weight: 600; } svg .label.accent { fill: var(--accent); } svg .label.second { fill: var(--second); }
svg .label.middle-run { fill: var(--accent); opacity: .7; }
.accent { color: var(--accent); } .second { color: var(--second); } .early { color: var(--muted); }
svg .middle-run { color: var(--accent); opacity: .5; }
svg .restart { stroke: var(--second); stroke-dasharray: 2 4; stroke-width: 1.5; } svg .checkpoint { fill: var(--muted); }
svg .skipped { stroke: var(--bad); stroke-width: 1.75; fill: none; }
.key { white-space: nowrap; margin-right: 14px; } .key .restart { color: var(--second); } .key .skipped { color: var(--bad); }
svg .mark { stroke: var(--bad); stroke-width: 1.5; }
svg .cross { stroke: var(--ink); stroke-opacity: .45; }
svg.heat rect { fill: var(--accent); shape-rendering: crispEdges; }
.ramp { display: inline-block; width: 72px; height: 9px; margin: 0 6px; border-radius: 2px; vertical-align: middle;
  background: linear-gradient(to right, color-mix(in srgb, var(--accent) 4%, transparent), var(--accent)); }
.wide { display: none; }
.samples { display: grid; gap: 24px 32px; margin-top: 20px; }
.sample h3 { font-size: 13px; font-weight: 400; color: var(--muted); margin: 0 0 6px; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0; padding: 14px 16px;
  background: var(--soft); border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre .prompt { font-weight: 700; } pre .mask { color: var(--second); opacity: .65; }
details { margin-top: 20px; border-top: 1px solid var(--rule); padding-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: 14px; }
table { border-collapse: collapse; font-size: 14px; } td { padding: 3px 24px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--muted); white-space: nowrap; }
.numbers { margin-top: 10px; } th { font-weight: 400; color: var(--muted); padding: 3px 24px 3px 0; text-align: right; }
.numbers td + td { text-align: right; }
.series-0 { color: var(--series-0); } .series-1 { color: var(--series-1); } .series-2 { color: var(--series-2); }
.series-3 { color: var(--series-3); } .series-4 { color: var(--series-4); } .series-5 { color: var(--series-5); }
.series-6 { color: var(--series-6); } .series-7 { color: var(--series-7); }
.legend { display: flex; flex-wrap: wrap; gap: 8px 24px; margin-top: 18px; font-size: 15px; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; background: currentColor; margin-right: 8px; }
.sideways { overflow-x: auto; margin-top: 14px; padding-bottom: 4px; }
.compared th, .compared td { padding: 7px 28px 7px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
.compared th { vertical-align: bottom; color: var(--ink); font-weight: 600; }
.compared th { white-space: normal; min-width: 92px; max-width: 220px; overflow-wrap: anywhere; }
.compared th:first-child, .compared td:first-child { text-align: left; }
.compared td:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 108px; max-width: 150px;
  padding-right: 16px; overflow-wrap: break-word; }
.compared .best { font-weight: 700; }
@media (min-width: 720px) {
  main { padding: 56px 40px 96px; }
  .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .span { grid-column: 1 / -1; } .span .wide { display: block; } .span .narrow { display: none; }
  .samples { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .compared td:first-child { max-width: none; white-space: nowrap; } }
@media (min-width: 1000px) {
  .headline { grid-template-columns: auto 1fr; }
  .headline .number { font-size: 96px; }
  .tiles { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  .charts { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .span2 { grid-column: span 2; } .span2 .wide { display: block; } .span2 .narrow { display: none; } }
"""

_SCRIPT = """
for (const svg of document.querySelectorAll('svg[data-hover]')) {
  const [xs, texts] = JSON.parse(svg.dataset.hover), cross = svg.querySelector('.cross');
  const value = svg.closest('figure').querySelector('.value'), resting = value.textContent;
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    xs.forEach((at, index) => { if (Math.abs(at - x) < Math.abs(xs[nearest] - x)) nearest = index; });
    if (!xs.length) return;
    cross.setAttribute('transform', `translate(${xs[nearest]} 0)`);
    cross.setAttribute('visibility', 'visible');
    value.textContent = texts[nearest];
  });
  svg.addEventListener('pointerleave', () => { cross.setAttribute('visibility', 'hidden'); value.textContent = resting; });
}
"""


def page(path: Path, runs: Sequence[str | Path], title: str, body: str) -> str:
    """Return the whole document. Its policy forbids the browser to fetch anything, in case a part of a sample is not escaped.

    Args:
        path: where the page will be.
        runs: the directories of the runs that the page shows.
    """
    return f"""{_start(path, runs)}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def shows_runs(path: Path, runs: Sequence[str | Path]) -> bool:
    """Tell whether a file is a page that w1train wrote there about these runs, in any order."""
    start = _start(path, runs).encode()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _start(path: Path, runs: Sequence[str | Path]) -> str:
    """Return the first lines of a page. They name the runs by their paths from the page's directory, so that a directory of runs with their
    pages can be moved."""
    directory = os.path.realpath(path.parent)
    names = sorted(os.path.relpath(os.path.realpath(run), directory) for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="w1train-runs" content="{html.escape(json.dumps(names))}">"""
