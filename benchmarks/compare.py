"""The command that compares the newest result of a benchmark with the last committed result.

    python -m benchmarks.compare
    python -m benchmarks.compare attention --newest $OUT/2026-11-22-attention.json

Without a name, it compares all benchmarks that have results. A comparison between different devices or versions has a warning.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.records import Record
from benchmarks.common.results_page import RESULTS, Table
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError

_NOTEWORTHY = 0.05
# By the last word of a metric. Other metrics (shares, layers) are neither better nor worse if they are larger.
_LARGER_IS_BETTER = {"tflops": True, "fraction": True, "mfu": True, "second": True, "ms": False, "gib": False}


def read_newest(benchmark: str, directory: Path) -> Record:
    """Return the newest result in the working tree.

    Raises:
        UserError: there is no result.
    """
    found = [Record.from_json(path.read_text(encoding="utf-8")) for path in directory.glob(f"*-{benchmark}.json")]
    found = [record for record in found if record.benchmark == benchmark]
    if not found:
        raise UserError(f"{directory} has no result of {benchmark}: run python -m benchmarks.{benchmark} --report")
    return max(found, key=lambda record: record.date)


def read_committed(benchmark: str, directory: Path, newest: Record) -> Record | None:
    """Return the newest result in git's HEAD that is older than ``newest``, or None."""
    listing = _git(directory, "ls-tree", "-r", "--name-only", "HEAD", "./")
    names = [name for name in listing.splitlines() if name.endswith(f"-{benchmark}.json")]
    found = [Record.from_json(_git(directory, "show", f"HEAD:./{name}")) for name in names]
    older = [record for record in found if record.benchmark == benchmark and record.date < newest.date]
    return max(older, key=lambda record: record.date, default=None)


def _git(directory: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise UserError(f"committed results are read from git, which says: {detail.strip()}") from error


def warnings(newest: Record, committed: Record) -> list[str]:
    """Return what may explain a difference other than the code."""
    lines = []
    if newest.machine.get("device") != committed.machine.get("device"):
        lines.append(f"other device: {committed.machine.get('device')} -> {newest.machine.get('device')}")
    for name in sorted(newest.versions.keys() | committed.versions.keys()):
        before, after = committed.versions.get(name, "absent"), newest.versions.get(name, "absent")
        if before != after:
            lines.append(f"other version of {name}: {before} -> {after}")
    driver = (committed.machine.get("driver"), newest.machine.get("driver"))
    if driver[0] != driver[1]:
        lines.append(f"other driver: {driver[0]} -> {driver[1]}")
    if newest.dry_run or committed.dry_run:
        lines.append("a dry run: its numbers mean nothing")
    return lines


def comparison(newest: Record, committed: Record) -> Table:
    """Return the table of every metric that both results have, and of the rows that only one result has."""
    rows: list[tuple[str, ...]] = []
    for name in list(dict.fromkeys([*committed.results, *newest.results])):
        before, after = committed.results.get(name), newest.results.get(name)
        if before is None or after is None:
            rows.append((name, "new" if before is None else "gone", "", "", "", ""))
            continue
        for metric in (metric for metric in before if metric in after):
            old, new = before[metric], after[metric]
            if old is not None and new is not None:
                ratio = new / old if old else float("nan")
                rows.append((name, metric, f"{old:.4g}", f"{new:.4g}", f"{ratio:.3f}", judgement(metric, ratio)))
    title = f"{newest.benchmark}: {newest.date[:10]} beside {committed.date[:10]} ({committed.commit or 'commit unknown'})"
    return Table(title, ("row", "metric", "committed", "newest", "ratio", ""), rows)


def judgement(metric: str, ratio: float) -> str:
    """Return "better" or "worse", or an empty text if the difference is small or the metric has no direction."""
    larger_is_better = _LARGER_IS_BETTER.get(metric.rpartition("_")[2])
    if larger_is_better is None or not abs(ratio - 1) > _NOTEWORTHY:
        return ""
    return "better" if (ratio > 1) == larger_is_better else "worse"


def main(arguments: Sequence[str]) -> int:
    """Run the command: print the tables. Return the exit status: 0, 1 if a metric is worse by more than 5 % on the same device and
    versions, 2 for bad input."""
    parser = ArgumentParser(prog="benchmarks.compare", description="Compare the newest result with the last committed one.")
    parser.add_argument("benchmarks", nargs="*", metavar="benchmark", help="attention, step, ... (default: all with results)")
    parser.add_argument("--newest", type=Path, help="the JSON file of the newest result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    worse = False
    try:
        newest_of = {record.benchmark: record for record in _newest(options)}
        if not newest_of:
            print(f"{options.results} has no results that a program can read")
        for benchmark, newest in newest_of.items():
            committed = read_committed(benchmark, options.results, newest)
            if committed is None:
                print(f"{benchmark}: no earlier result is committed")
                continue
            table = comparison(newest, committed)
            table.print()
            cautions = warnings(newest, committed)
            print("\n".join(f"warning: {line}" for line in cautions))
            worse |= not cautions and any(row[-1] == "worse" for row in table.rows)
    except (UserError, OSError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    return 1 if worse else 0


def _newest(options: argparse.Namespace) -> list[Record]:
    if options.newest is not None:
        return [Record.from_json(options.newest.read_text(encoding="utf-8"))]
    names = options.benchmarks or sorted({path.stem.split("-", 3)[3] for path in options.results.glob("????-??-??-*.json")})
    return [read_newest(name, options.results) for name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
