"""The comparison of `make curriculum`: is the curriculum from autoregression to blocks better than blocks from scratch on the same number
of tokens?

    make curriculum
    python -m benchmarks.curriculum runs/curriculum runs/curriculum-scratch --report

It reads the records of two finished runs, and trains nothing.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean

from benchmarks.common.results_page import Table, environment, write_report
from w1train.config.argument_parser import ArgumentParser
from w1train.reports.run_content import Run, read_run

NUM_STEPS = 5
"""Losses before and after a change of the objective are means over this number of steps."""


def changes(run: Run, scratch: Run) -> Table:
    """Return the table of the training loss before and after each change of the objective, and at a start from random weights."""
    start = mean(record["elbo"] for record in scratch.train[:NUM_STEPS])
    stages = [(name, list(records)) for name, records in groupby(run.train, key=lambda record: record["stage"])]
    rows = []
    for (_, before), (name, after) in pairwise(stages):
        if before[-1]["block_size"] != after[0]["block_size"] or before[-1]["stage"] == stages[0][0]:
            last = mean(record["elbo"] for record in before[-NUM_STEPS:])
            first = mean(record["elbo"] for record in after[:NUM_STEPS])
            rows.append((name, str(after[0]["block_size"]), f"{last:.3f}", f"{first:.3f}", f"{first - last:+.3f}", f"{start:.3f}"))
    columns = ("stage", "block size", "ELBO before", "after", "jump", "of a start from nothing")
    return Table(f"Where the objective changes: nats a token, means over {NUM_STEPS} steps", columns, rows)


def ends(run: Run, scratch: Run) -> Table:
    """Return the table of the validation at the last step of both runs, and of the average."""
    rows = []
    for name, each in (("curriculum", run), ("from scratch", scratch)):
        last = each.validation[-1]
        rows.append((name, f"{each.train[-1]['tokens']:,}", *_scores(last)))
    average = _average(run)
    if average is not None:
        best = min(average["member_elbo"])
        rows.append(("average of the curriculum's best", "", *_scores(average)))
        rows.append(
            (f"its best member (step {average['best_member']})", "", f"{best:.4f}", f"{min(average['member_elbo_bits_per_byte']):.4f}")
        )
    return Table("At the end, on validation text", ("", "tokens", "block ELBO, nats a token", "bits per byte"), rows)


def verdicts(run: Run, scratch: Run) -> list[tuple[str, bool]]:
    """Return the three claims, and whether each of them holds."""
    start = mean(record["elbo"] for record in scratch.train[:NUM_STEPS])
    stages = [list(records) for _, records in groupby(run.train, key=lambda record: record["stage"])]
    jumps = [
        mean(r["elbo"] for r in after[:NUM_STEPS]) - mean(r["elbo"] for r in before[-NUM_STEPS:]) for before, after in pairwise(stages)
    ]
    fall = start - mean(record["elbo"] for record in scratch.train[-NUM_STEPS:])
    claims = [
        (f"the largest jump, {max(jumps):+.3f}, is less than what a start from nothing has to make up, {fall:.3f}", max(jumps) < fall),
        ("the curriculum ends below training from scratch", run.validation[-1]["elbo"] < scratch.validation[-1]["elbo"]),
    ]
    average = _average(run)
    is_no_worse = average is not None and average["elbo"] <= min(average["member_elbo"])
    return [*claims, ("the average of the best checkpoints is no worse than its best member", is_no_worse)]


def _average(run: Run) -> dict | None:
    return run.averages[-1] if run.averages else None


def _scores(record: dict) -> tuple[str, str]:
    return f"{record['elbo']:.4f}", f"{record['elbo_bits_per_byte']:.4f}"


def main(arguments: Sequence[str]) -> int:
    """Run the command, and with ``--report`` write benchmarks/results/YYYY-MM-DD-curriculum.md. Return the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.curriculum", description="Compare the curriculum with training from scratch.")
    parser.add_argument("run", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    run, scratch = read_run(options.run), read_run(options.scratch)
    tables = [ends(run, scratch), changes(run, scratch)]
    for table in tables:
        table.print()
    held = verdicts(run, scratch)
    for claim, holds in held:
        print(f"{'yes' if holds else 'NO'}: {claim}")
    if options.report:
        command = f"make curriculum; python -m benchmarks.curriculum {options.run} {options.scratch} --report"
        notes = "\n".join(f"- {'yes' if holds else '**no**'}: {claim}" for claim, holds in held)
        print(
            write_report(
                "curriculum", "The block-size curriculum against block diffusion from scratch", [*tables, environment(command)], notes
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
