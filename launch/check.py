"""The check that launchers make before they start a run: is the configuration valid on so many ranks, and does this machine have what the
run needs?

    python -m launch.check --ranks 16 -- recipe=w1_4b
    python -m launch.check --ranks 8 --ranks-here 8 -- recipe=w1_4b

It prints two lines: the run directory, and the seconds that ranks may take to stop after a signal (health.stop_timeout). A mistake in the
recipe is reported once, before any rank is started or a job waits in a queue.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from w1train.config.argument_parser import ArgumentParser
from w1train.config.command_line import parse_command_line
from w1train.config.errors import ConfigurationError, Problem
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.preflight.start_rules import run_rules
from w1train.pretrain import COUNTS
from w1train.registered_names import NAME_RULES
from w1train.runtime.command import command


def checked_config(
    arguments: Sequence[str], num_ranks: int | None, ranks_here: int | None = None, more_rules: Sequence[Rule] = ()
) -> Config:
    """Return the configuration that arguments of w1train.pretrain describe.

    Args:
        num_ranks: the number of ranks that the layout must be valid on; None = not known.
        ranks_here: the number of ranks on this machine, which is checked too; None = it is not checked.
        more_rules: what the caller checks too.

    Raises:
        ConfigurationError: the arguments, the recipe or the layout have problems; it has all of them.
    """

    def rules(counts: Mapping[str, int]) -> list[Rule]:
        return [*run_rules(num_ranks, ranks_here, counts.get("--max-steps")), *more_rules]

    command_line = parse_command_line(arguments, NAME_RULES, COUNTS, rules)
    if command_line.config is None or command_line.action != "run":
        flag = {"print_config": "--cfg", "list": "--list", "help": "--help"}[command_line.action]
        typed = shlex.join(["w1train", "train", *arguments])
        raise ConfigurationError([Problem(flag, "a flag that only prints", "arguments that train", typed)])
    return command_line.config


def nsys_problems(ranks: str | None, config: Config) -> Iterator[Problem]:
    """Yield the reasons why nsys would record nothing, because it records only the steps and ranks that the run marks.

    Args:
        ranks: the ranks that run under nsys: numbers separated by commas, "all", or None for no rank.
    """
    profiling = config.profiling
    wanted = 'profiling.tool=nsys "profiling.steps=[20,24]"'
    if ranks is None:
        return
    if profiling.tool != "nsys" or not profiling.steps:
        found = f"profiling.tool={profiling.tool}, profiling.steps={profiling.steps}"
        yield Problem("--nsys", found, "a run that marks the steps to be recorded", wanted)
        return
    silent = [] if ranks == "all" else [rank for rank in ranks.split(",") if int(rank) not in profiling.ranks]
    if silent:
        found = f"{ranks}, with profiling.ranks={profiling.ranks}"
        yield Problem("--nsys", found, "ranks that mark their steps", f'"profiling.ranks=[{ranks}]"')


@command("launch.check")
def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input."""
    parser = ArgumentParser(prog="python -m launch.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks of the whole run")
    here = "number of ranks on this machine, if all ranks are here: files, disks and GPUs are then checked too"
    parser.add_argument("--ranks-here", type=int, help=here)
    parser.add_argument("--nsys", metavar="RANKS", help="ranks that will run under nsys: numbers separated by commas, or all")
    parser.add_argument("arguments", nargs="*", help="arguments of w1train.pretrain, after --")
    options = parser.parse_args(arguments)
    try:
        config = checked_config(options.arguments, options.ranks, options.ranks_here, [partial(nsys_problems, options.nsys)])
    except ConfigurationError as error:
        print(f"w1train train: {error}\n\n'w1train train --help' explains the command line.", file=sys.stderr)
        return 2
    print(Path(config.runs_dir) / config.name)
    print(config.health.stop_timeout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
