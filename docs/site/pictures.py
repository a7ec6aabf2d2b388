"""The pictures of README.md and of the site, made from a real run.

    python -m docs.site.pictures                             # runs `make demo` in a terminal of its own, and takes both pictures
    python -m docs.site.pictures --run runs/demo             # the report of a run that exists, and the recording beside it
    python -m docs.site.pictures -- make demo RUNS=/tmp/runs # another command

The terminal's picture is an SVG with the last lines that the command left on the screen, and the report's a photograph by Chromium.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from tests.browser import browser
from w1train.config.argument_parser import ArgumentParser

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PICTURES = REPOSITORY / "docs" / "pictures"
COLUMNS, SCREEN_LINES = 110, 400
REPORT_WIDTH, REPORT_HEIGHT = 1200, 980
WEBP_QUALITY = 82
RECORDING = "console.raw"
# rich's own template loads a font from the network, which an SVG in a page may not do.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px; }} .{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def record(command: Sequence[str], columns: int = COLUMNS, lines: int = SCREEN_LINES) -> bytes:
    """Run a command in a terminal of its own, show its output here too, and return all that it wrote to the terminal."""
    main, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=secondary, stdout=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    recorded = b""
    while chunk := _read(main):
        recorded += chunk
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
    os.close(main)
    if status := process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return recorded


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux reports the end of the last process in a terminal as an error
        return b""


def screen_of(recorded: bytes, columns: int = COLUMNS, lines: int = SCREEN_LINES) -> list[Text]:
    """Return the lines that a terminal shows after it has received these bytes, without the empty lines at the end."""
    screen = pyte.Screen(columns, lines)
    pyte.ByteStream(screen).feed(recorded)
    texts = [_line(screen, number) for number in range(lines)]
    while texts and not texts[-1].plain.strip():
        texts.pop()
    return texts


def _line(screen: pyte.Screen, number: int) -> Text:
    cells = [screen.buffer[number][column] for column in range(screen.columns)]
    text = Text(no_wrap=True)
    for (color, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
        text.append("".join(cell.data for cell in run), Style(color=_color(color), bold=bold))
    text.rstrip()
    return text


def _color(name: str) -> str | None:
    """Return rich's name of one of pyte's colors: "default", a name such as "brightblack", or six hexadecimal digits."""
    if name == "default":
        return None
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    name = {"brown": "yellow", "brightbrown": "brightyellow"}.get(name, name)
    return name.replace("bright", "bright_")


def terminal_svg(lines: Sequence[Text], title: str, columns: int = COLUMNS) -> str:
    """Return a picture of a terminal with these lines."""
    console = Console(record=True, width=columns, file=io.StringIO(), highlight=False, force_terminal=True)
    for line in lines:
        console.print(line)
    return console.export_svg(title=title, theme=MONOKAI, code_format=SVG, unique_id="terminal")


def photograph(report: Path) -> bytes:
    """Return the upper part of a page as a WebP image."""
    with browser() as chromium:
        chromium.open(report, REPORT_WIDTH, REPORT_HEIGHT)
        answer = chromium.call(
            "Page.captureScreenshot",
            format="webp",
            quality=WEBP_QUALITY,
            clip={"x": 0, "y": 0, "width": REPORT_WIDTH, "height": REPORT_HEIGHT, "scale": 1},
        )
    return base64.b64decode(answer["data"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="python -m docs.site.pictures", description="Make the pictures of README.md.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=REPOSITORY / "runs" / "demo", help="the run directory that the command writes")
    parser.add_argument("--lines", type=int, default=34, help="the number of lines of the terminal's picture, from the end (default: 34)")
    parser.add_argument("--again", action="store_true", help="start no command: take the recording and the report of the last call")
    parser.add_argument("command", nargs="*", default=["make", "demo"], help="the command (default: make demo)")
    return parser.parse_args(arguments)


def main() -> None:
    """Make both pictures."""
    options = parse()
    recording = options.run / RECORDING
    if not options.again:
        recorded = record(options.command)
        recording.write_bytes(recorded)
    lines = screen_of(recording.read_bytes())[-options.lines :]
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "terminal.svg").write_text(terminal_svg(lines, " ".join(options.command)), encoding="utf-8")
    (PICTURES / "report.webp").write_bytes(photograph(options.run / "report.html"))
    for name in ("terminal.svg", "report.webp"):
        print(f"{PICTURES / name}: {(PICTURES / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
