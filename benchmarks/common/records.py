"""Results in JSON, beside each Markdown report, for benchmarks.compare."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common.machine import describe, gpu_environment, open_device, versions
from benchmarks.common.results_page import RESULTS, Table, write_report
from w1train.config.errors import UserError

Results = dict[str, dict[str, float | None]]
"""Values by row and metric; None = not measured. The last word of a metric is its unit: forward_ms, visible_tflops, memory_gib, mfu."""


@dataclass(slots=True, kw_only=True)
class Record:
    """The record of one measurement."""

    benchmark: str
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    results: Results
    date: str = ""
    commit: str = ""
    dry_run: bool = False
    """True: the run only shows that the benchmark works, on the CPU or with tiny shapes, and its numbers mean nothing."""

    def __post_init__(self) -> None:
        self.date = self.date or datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.commit = self.commit or _commit()

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return the record that ``to_json`` has written."""
        return cls(**json.loads(text))


def _commit() -> str:
    """Return the commit, or an empty text without git, as on a machine that the tree was copied to."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def is_dry_run(options: argparse.Namespace) -> bool:
    """Tell whether --device or --tiny makes the run a dry run, whose numbers mean nothing."""
    return bool(options.tiny or options.device == "cpu")


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that --device names. With --report, first make sure that the report may be written to --output.

    Raises:
        UserError: torch does not find the device, or a dry run would be reported among the results.
    """
    device = open_device(options.device)
    if options.report:
        require_report_place(options.output, is_dry_run(options))
    return device


def record_of(
    benchmark: str, results: Results, device: torch.device, options: argparse.Namespace, module: str, arguments: Sequence[str]
) -> Record:
    """Return the record of a measurement that ``python -m module arguments`` has just made."""
    return Record(
        benchmark=benchmark,
        command=shlex.join(["python", "-m", module, *arguments]),
        machine=describe(device),
        versions=versions(),
        results=results,
        dry_run=is_dry_run(options),
    )


def require_report_place(directory: Path, dry_run: bool) -> None:
    """Refuse to report a dry run among the results. Commands call this before they measure anything.

    Raises:
        UserError: a dry run would be reported among the results.
    """
    if dry_run and directory.resolve() == RESULTS.resolve():
        raise UserError(f"a dry run is not a result, and is not written to {RESULTS}; name another directory with --output")


def publish(record: Record, title: str, tables: Sequence[Table], notes: str, plot: str, directory: Path) -> Path:
    """Write ``YYYY-MM-DD-benchmark.md``, ``.json`` and ``.svg``, and return the path of the first.

    Args:
        tables: the report's tables, to which the table of machine, versions and command is added.
    """
    require_report_place(directory, record.dry_run)
    title = f"Dry run, not a result: {title}" if record.dry_run else title
    picture = f"{datetime.date.today().isoformat()}-{record.benchmark}.svg"
    shown = [*tables, gpu_environment(record.command, record.machine, record.versions)]
    path = write_report(record.benchmark, title, shown, f"{notes.strip()}\n\n![{title}]({picture})", directory)
    path.with_suffix(".json").write_text(record.to_json(), encoding="utf-8")
    path.with_suffix(".svg").write_text(plot, encoding="utf-8")
    return path
