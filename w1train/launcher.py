"""The command that trains a model on this machine: it reads a recipe and writes a run directory.

    w1train train recipe=demo
    w1train train --nproc 8 recipe=w1_4b parallel.tensor=4
    w1train train --max-steps 20 recipe=demo name=trial

With one rank, the model trains in this process. With --nproc N, this process checks the run once, starts N ranks of w1train.pretrain
(w1train/local_ranks.py), and waits for them. The same command, given again, resumes the run.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from w1train.config.command_line import config_from_command_line, without_flag
from w1train.config.errors import ConfigurationError, Problem
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.local_ranks import run_local_ranks
from w1train.pretrain import COUNTS as RANK_COUNTS
from w1train.pretrain import DESCRIPTION, PROGRAM, fail_alone, rank_rules, train
from w1train.registered_names import NAME_RULES
from w1train.runtime.announcement import announce
from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command
from w1train.runtime.exit_status import ExitStatus

COUNTS = {
    "--nproc": "ranks to start on this machine: one for each GPU, or one for some cores of the CPU (default: 1)",
    **RANK_COUNTS,
}
"""The flags that this command has beside those of the configuration, and their meanings."""


@command(PROGRAM)
def main(arguments: Sequence[str]) -> int:
    """Run the command. Return an ExitStatus (w1train.runtime.exit_status)."""
    try:
        discovery = discover_ranks()
    except ConfigurationError as error:
        return fail_alone(str(error), ExitStatus.MISTAKE)
    announce(arguments)
    config, counts = config_from_command_line(arguments, PROGRAM, DESCRIPTION, NAME_RULES, COUNTS, _rules_before_start)
    num_ranks = counts.get("--nproc", 1)
    if num_ranks == 1:
        return train(config, counts.get("--max-steps"), discovery)
    return _start_ranks(config, without_flag(arguments, "--nproc"), num_ranks)


def _rules_before_start(counts: Mapping[str, int]) -> tuple[Rule, ...]:
    from w1train.preflight.start_rules import run_rules  # it imports NumPy, for which the first line of the run should not wait

    num_ranks = counts.get("--nproc", 1)
    return rank_rules(counts) if num_ranks == 1 else (_launched_once, *run_rules(num_ranks, num_ranks, counts.get("--max-steps")))


def _launched_once(_config: Config) -> Iterator[Problem]:
    """Yield the problem of a process that is a rank already, and would start ranks of its own."""
    if "RANK" in os.environ:
        found = f"in a process that torchrun or srun has started as rank {os.environ['RANK']}"
        yield Problem("--nproc", found, "only where nothing else starts ranks", "the same command without --nproc")


def _start_ranks(config: Config, arguments: Sequence[str], num_ranks: int) -> int:
    logs = Path(config.runs_dir) / config.name / "logs" / time.strftime("train_%Y%m%d_%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    outcome = run_local_ranks(["-m", "w1train.pretrain", *arguments], num_ranks, logs)
    if outcome.message:
        print(f"{PROGRAM}: {outcome.message}", file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
