"""The fixed parts of a page: its frame, style and script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"
_UPLOT = _ASSETS / "uplot"


def style() -> str:
    """Return the style of a page."""
    return _read(_UPLOT / "uPlot.min.css") + _read(_ASSETS / "page.css")


def script() -> str:
    """Return the script of a page: uPlot with its licence, which every copy must have, and the code that draws the charts with uPlot."""
    return f"/*\n{_read(_UPLOT / 'LICENSE')}\n*/\n{_read(_UPLOT / 'uPlot.iife.min.js')}{_read(_ASSETS / 'charts.js')}"


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


POINTER_NOTE = (
    "Point at a chart for its values, drag in it to zoom, and double-click to see all. On the keyboard, use Tab, the arrow keys, + and -, "
    "and Escape."
)


def section(title: str, content: str) -> str:
    """Return a part of a page with a heading, which :func:`contents` links to."""
    return f'<section id="{_anchor(title)}"><h2>{title}</h2>{content}</section>'


def contents(sections: Sequence[str]) -> str:
    """Return links to the sections, so that the keyboard need not go through all charts."""
    titles = [text.partition("<h2>")[2].partition("</h2>")[0] for text in sections if text]
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in titles)
    return f'<nav class="contents" aria-label="Sections">{links}</nav>'


def wide_table(table: str) -> str:
    """Return a table that scrolls sideways if it is wide, also by the keyboard."""
    return f'<div class="sideways" role="region" aria-label="Table" tabindex="0">{table}</div>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def page(path: Path, runs: Sequence[str | Path], title: str, body: str) -> str:
    """Return the whole document. In case a part of a sample is not escaped, its policy forbids the browser to fetch anything, and to run
    another script than the page's own, which it knows by its SHA-256.

    Args:
        path: where the page will be.
        runs: the directories of the runs that the page shows.
    """
    own_script = script()
    digest = base64.b64encode(hashlib.sha256(own_script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""{_start(path, runs)}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title>
<style>{style()}</style>
</head>
<body>
<main>
<noscript><p class="note">The charts of this page need JavaScript.</p></noscript>
{body}
</main>
<script>{own_script}</script>
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
