"""Tables of measurements for the terminal, and dated reports in benchmarks/results/."""

from __future__ import annotations

import datetime
import html
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table as RichTable

from w1train.reports.report_page import wide_table

RESULTS = Path(__file__).parents[1] / "results"
_LOG_WIDTH = 160
_PACKAGES = ("torch", "megatron-core", "numpy")


@dataclass(slots=True, frozen=True)
class Table:
    """A table of texts. Its first column is left-aligned, and the others are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def print(self) -> None:
        """Print the table to the terminal."""
        table = RichTable(title=self.title, title_justify="left", min_width=len(self.title))
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        # A log has no width, and rich would use 80 columns.
        width = None if sys.stdout.isatty() else _LOG_WIDTH
        Console(highlight=False, markup=False, width=width).print(table)

    def markdown(self) -> str:
        """Return the table as Markdown, for a report."""
        alignment = ["---", *("---:" for _ in self.columns[1:])]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(row)} |" for row in (self.columns, alignment, *self.rows))])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim about results, and whether it holds."""

    claim: str
    holds: bool


def verdict_lines(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a list of Markdown."""
    return "\n".join(f"- {'yes' if verdict.holds else '**no**'}: {verdict.claim}" for verdict in verdicts)


def html_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a list of a page."""
    items = "".join(f"<li>{'yes' if verdict.holds else '<b>no</b>'}: {html.escape(verdict.claim)}</li>" for verdict in verdicts)
    return f"<ul>{items}</ul>"


def html_note(text: str) -> str:
    """Return a paragraph of a page."""
    return f'<p class="note">{text}</p>'


def html_table(table: Table) -> str:
    """Return a table of a page."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return wide_table(f'<table class="numbers"><tr>{head}</tr>{body}</table>')


def environment(command: str) -> Table:
    """Return the table of machine, versions and command, without which a number means nothing."""
    memory = psutil.virtual_memory().total / 2**30
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    rows = [
        ("date", datetime.datetime.now().astimezone().isoformat(timespec="seconds")),
        ("command", f"`{command}`"),
        ("processor", f"{_processor()}, {os.cpu_count()} cores"),
        ("memory", f"{memory:.0f} GiB"),
        ("load average at the end (1, 5, 15 minutes)", load),
        ("system", f"{platform.system()} {platform.release()}"),
        ("Python", platform.python_version()),
        *((name, metadata.version(name)) for name in _PACKAGES),
    ]
    return Table("Where and how", ("", ""), rows)


def write_report(name: str, title: str, tables: Sequence[Table], notes: str, directory: Path = RESULTS) -> Path:
    """Write ``YYYY-MM-DD-name.md``, and return its path. A second report of a day replaces the first.

    Args:
        notes: Markdown above the tables, which says what was compared with what.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.date.today().isoformat()}-{name}.md"
    path.write_text("\n\n".join([f"# {title}", notes.strip(), *(table.markdown() for table in tables)]) + "\n", encoding="utf-8")
    return path


def spread(values: Sequence[float], number: str) -> str:
    """Return "median (first quartile to third quartile)", each in the given format."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return f"{number.format(median)} ({number.format(low)} to {number.format(high)})"


def _processor() -> str:
    """Return the processor's name from /proc/cpuinfo. On Linux, platform.processor() is empty or only the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_results(tables: Sequence[Table], verdicts: Sequence[Verdict]) -> None:
    """Print the tables, and each claim with its verdict."""
    for table in tables:
        table.print()
    for verdict in verdicts:
        print(f"{'yes' if verdict.holds else 'NO'}: {verdict.claim}")
