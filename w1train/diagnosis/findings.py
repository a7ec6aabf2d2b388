"""Findings and their output: a table on a terminal, plain lines in a file or a pipe, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "note", "warning", "failed"]
"""note: information, or something that w1train does not need. warning: it works, but not as it should. failed: it does not work."""

_STYLES: dict[Status, str] = {"ok": "green", "note": "dim", "warning": "yellow", "failed": "bold red"}


@dataclass(slots=True)
class Finding:
    """The result of one check."""

    name: str
    value: str
    status: Status = "ok"
    detail: str = ""
    """The reason, or what to do."""


@dataclass(slots=True)
class Section:
    """Findings that belong together."""

    title: str
    findings: list[Finding] = field(default_factory=list)


def failures(sections: Sequence[Section]) -> Iterator[Finding]:
    """Return the findings that failed."""
    return (finding for section in sections for finding in section.findings if finding.status == "failed")


def as_dict(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the sections as plain data for JSON."""
    return {"ok": not any(failures(sections)), "sections": [asdict(section) for section in sections]}


def show(sections: Sequence[Section], console: Console) -> None:
    """Print all findings, with the verdict at the end."""
    for section in sections:
        if console.is_terminal:
            console.print(_table(section))
        else:
            _print_plain(section, console)
    failed = list(failures(sections))
    num_warnings = sum(finding.status == "warning" for section in sections for finding in section.findings)
    warned = f" ({num_warnings} warnings)" if num_warnings else ""
    if failed:
        console.print(Text(f"DOES NOT WORK: {', '.join(finding.name for finding in failed)}{warned}", style=_STYLES["failed"]))
    else:
        console.print(Text(f"works{warned}", style=_STYLES["ok"]))


def _table(section: Section) -> Table:
    table = Table(title=section.title, title_justify="left", show_header=False)
    for finding in section.findings:
        style = _STYLES[finding.status]
        table.add_row(Text(finding.name), Text(finding.value), Text(finding.status, style=style), Text(finding.detail))
    return table


def _print_plain(section: Section, console: Console) -> None:
    """Print one line for each finding, in columns and without line breaks, because there is no terminal whose width matters."""
    console.print(Text(section.title))
    name_width = max((len(finding.name) for finding in section.findings), default=0)
    value_width = max((len(finding.value) for finding in section.findings), default=0)
    for finding in section.findings:
        line = f"  {finding.status:<7}  {finding.name:<{name_width}}  {finding.value:<{value_width}}  {finding.detail}"
        console.print(Text(line.rstrip()), soft_wrap=True)
