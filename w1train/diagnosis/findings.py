"""What was found out, one line each, and how it is shown: a table on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "note", "warning", "failed"]
"""note: nothing to judge, or a thing that can be done without. warning: works, but not as it should. failed: does not work."""

_STYLES: dict[Status, str] = {"ok": "green", "note": "dim", "warning": "yellow", "failed": "bold red"}


@dataclass(slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    status: Status = "ok"
    detail: str = ""
    """Why it is so, or what to do."""


@dataclass(slots=True)
class Section:
    """What belongs together."""

    title: str
    findings: list[Finding] = field(default_factory=list)


def failures(sections: Sequence[Section]) -> Iterator[Finding]:
    """What does not work."""
    return (finding for section in sections for finding in section.findings if finding.status == "failed")


def as_dict(sections: Sequence[Section]) -> dict[str, Any]:
    """For JSON."""
    return {"ok": not any(failures(sections)), "sections": [asdict(section) for section in sections]}


def show(sections: Sequence[Section], console: Console) -> None:
    """Everything, and the verdict last."""
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
    """A line a finding, in columns, whatever the width of the terminal that is not there."""
    console.print(Text(section.title))
    name_width = max((len(finding.name) for finding in section.findings), default=0)
    value_width = max((len(finding.value) for finding in section.findings), default=0)
    for finding in section.findings:
        line = f"  {finding.status:<7}  {finding.name:<{name_width}}  {finding.value:<{value_width}}  {finding.detail}"
        console.print(Text(line.rstrip()), soft_wrap=True)
