"""The command ``python -m tests.chaos``: it runs the campaign and prints a table of the faults that runs recovered from."""

from __future__ import annotations

import os

# Before anything imports torch, as in tests/conftest.py: one thread for each process, no GPU, no uploads.
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", WANDB_MODE="offline")

import argparse
import contextlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.results_page import Table, environment, write_report
from tests.chaos.campaign import Campaign, Result, draw
from tests.chaos.disk import how_a_disk_fills
from tests.chaos.faults import FAULTS
from tests.chaos.jobs import GRACE_SECONDS, die_with_parent
from tests.chaos.scene import CHECKPOINT_INTERVAL, HANG_SECONDS, LAYOUTS, NUM_STEPS
from w1train.config.argument_parser import ArgumentParser

NUM_RUNS = len(FAULTS) * len(LAYOUTS)
_BUSY = "import time; end = time.monotonic() + 7200\nwhile time.monotonic() < end: pass"


def main(arguments: Sequence[str]) -> int:
    """Run the campaign. Return the exit status: 0 if every run recovered, else 1."""
    options = parse(arguments)
    directory = Path(tempfile.mkdtemp(prefix="w1train-chaos-"))
    began, results = time.monotonic(), []
    with busy_processes(options.busy):
        campaign = Campaign(directory, options.seed, options.overrides)
        for number, fault, layout in draw(options.num_runs, options.only):
            results.append(campaign.run(number, fault, layout))
            print(results[-1].line(), flush=True)
    tables = [summary(results)]
    tables[0].print()
    failed = [result for result in results if result.problems]
    minutes = (time.monotonic() - began) / 60
    print(f"{len(results) - len(failed)} of {len(results)} runs recovered, in {minutes:.1f} minutes")
    if failed:
        print(f"the files of the others are in {directory}")
    else:
        shutil.rmtree(directory)
    if options.report:
        tables += [listing(results), environment(shlex.join(["python", "-m", "tests.chaos", *arguments]))]
        name = "chaos-busy" if options.busy else "chaos"
        print(f"wrote {write_report(name, 'Campaign of faults', tables, notes(len(results), minutes, options.busy))}")
    return 1 if failed else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    names = [fault.name for fault in FAULTS]
    parser = ArgumentParser(prog="tests.chaos", description="Disturb trainings on two ranks, and compare with undisturbed ones.")
    parser.add_argument("--num-runs", type=int, default=NUM_RUNS, help=f"number of runs (default: {NUM_RUNS})")
    parser.add_argument("--seed", type=int, default=0, help="seed of steps, delays, ranks and places (default: 0)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=names,
        metavar="FAULT",
        help=f"only runs with this fault; may be repeated: {', '.join(names)}",
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="NUMBER", help="number of processes that compute during the campaign (default: 0)"
    )
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for every run")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes that only compute during the block, for two hours at most and never longer than this process."""
    processes = [
        subprocess.Popen([sys.executable, "-c", _BUSY], preexec_fn=partial(die_with_parent, signal.SIGKILL)) for _ in range(number)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def summary(results: Sequence[Result]) -> Table:
    """Return the table with a row for each fault, and a row for all."""
    columns = ("fault", "runs", "recovered", "restarts", "steps redone, most", "worst recovery, s")
    rows = []
    for fault in FAULTS:
        if of_fault := [result for result in results if result.fault is fault]:
            rows.append((fault.title, *_numbers(of_fault)))
    return Table("Faults", columns, [*rows, ("all", *_numbers(results))])


def _numbers(results: Sequence[Result]) -> tuple[str, ...]:
    recovered = [result for result in results if not result.problems]
    restarts = sum(max(0, result.story.num_starts - 1) for result in results)
    redone = max((result.story.lost for result in recovered), default=0)
    worst = max((result.story.recovery_seconds or 0.0 for result in recovered), default=0.0)
    return str(len(results)), str(len(recovered)), str(restarts), str(redone), f"{worst:.1f}"


def listing(results: Sequence[Result]) -> Table:
    """Return the table with a row for each run."""
    rows = []
    for result in results:
        story = result.story
        recovery = "FAILED" if result.problems else f"{story.recovery_seconds or 0.0:.1f}"
        numbers = (result.layout, str(result.step), str(max(0, story.num_starts - 1)), str(story.lost), recovery, f"{result.load:.1f}")
        rows.append((f"{result.number} {result.fault.name}", *numbers))
    return Table("Runs", ("run", "layout", "step", "restarts", "steps redone", "recovery, s", "load"), rows)


def notes(num_runs: int, minutes: float, num_busy: int) -> str:
    """Return the report's text: what was done, and what the columns mean."""
    beside = f"beside {num_busy} processes that compute all the time" if num_busy else "with no other process started by the campaign"
    return f"""\
{num_runs} trainings of a tiny model in {minutes:.1f} minutes, {beside}: {NUM_STEPS} steps on two ranks, a checkpoint every
{CHECKPOINT_INTERVAL}. Each meets one fault at a random moment, the layouts (tensor, pipeline and data parallel, two of a mixture of
experts, two of fine-tuning, and two of preferences) in turn. *Recovered* means: the records of every step (loss, ELBO, gradient norm,
loss by t, validation and all else but times), the samples, and every tensor of the last checkpoint are those of the undisturbed run of
the layout, bit for bit (with the persistent NaN: of the run that left the same step out; with another layout: of the run that was stopped
at the same checkpoint and went on under that layout); the first restart went on from the newest good checkpoint that was complete when
the fault came; ranks ended with the statuses, after the messages and within the number of restarts that the fault allows; nothing is left
of half a save, and no duration is negative. No time is judged.

*Steps redone* are recorded steps that were done again. *Recovery* is the time from the fault to the first step that had not been done
before, with everything in between: noticing it, the launcher's {GRACE_SECONDS:.0f} s of grace for the rank that is left, the restart,
the steps redone. *Load* is the machine's load average over the minute before the run's end. Hangs are noticed after {HANG_SECONDS} s here
(health.hang_timeout; its default is 600). Ranks are forked from a process that has imported torch and megatron-core, but those under
torchrun, which start from nothing. The full disk is {how_a_disk_fills()}."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
