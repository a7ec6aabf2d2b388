"""The check that launchers make before they start a run: is the configuration valid on so many ranks?

    python -m launch.check --ranks 16 -- recipe=w1_4b

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
from collections.abc import Sequence
from pathlib import Path

from w1train.config.argument_parser import ArgumentParser
from w1train.config.command_line import parse_command_line
from w1train.config.errors import ConfigurationError, Problem, raise_if_any
from w1train.config.schema import Config
from w1train.pretrain import COUNTS, problems_before_start
from w1train.registered_names import NAME_RULES
from w1train.runtime.command import command


def checked_config(arguments: Sequence[str], num_ranks: int | None) -> Config:
    """Return the configuration that arguments of w1train.pretrain describe.

    Args:
        num_ranks: the number of ranks that the layout must be valid on; None = not known.

    Raises:
        ConfigurationError: the arguments, the recipe or the layout have problems; it has all of them.
    """
    command_line = parse_command_line(arguments, NAME_RULES, COUNTS)
    if command_line.config is None or command_line.action != "run":
        flag = next(word for word in arguments if word.startswith("-"))
        raise ConfigurationError([Problem(flag, "a flag that only prints", "arguments that train", "w1train train " + flag)])
    raise_if_any(problems_before_start(command_line.config, num_ranks))
    return command_line.config


def nsys_problems(ranks: str | None, config: Config) -> list[Problem]:
    """Return the reasons why nsys would record nothing, because it records only the steps and ranks that the run marks.

    Args:
        ranks: the ranks that run under nsys: numbers separated by commas, "all", or None for no rank.
    """
    profiling = config.profiling
    wanted = 'profiling.tool=nsys "profiling.steps=[20,24]"'
    if ranks is None:
        return []
    if profiling.tool != "nsys" or not profiling.steps:
        found = f"profiling.tool={profiling.tool}, profiling.steps={profiling.steps}"
        return [Problem("--nsys", found, "a run that marks the steps to be recorded", wanted)]
    silent = [] if ranks == "all" else [rank for rank in ranks.split(",") if int(rank) not in profiling.ranks]
    if not silent:
        return []
    found = f"{ranks}, with profiling.ranks={profiling.ranks}"
    return [Problem("--nsys", found, "ranks that mark their steps", f'"profiling.ranks=[{ranks}]"')]


@command("launch.check")
def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input."""
    parser = ArgumentParser(prog="python -m launch.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks of the whole run")
    parser.add_argument("--nsys", metavar="RANKS", help="ranks that will run under nsys: numbers separated by commas, or all")
    parser.add_argument("arguments", nargs="*", help="arguments of w1train.pretrain, after --")
    options = parser.parse_args(arguments)
    try:
        config = checked_config(options.arguments, options.ranks)
        raise_if_any(nsys_problems(options.nsys, config))
    except ConfigurationError as error:
        print(f"w1train train: {error}\n\n'w1train train --help' explains the command line.", file=sys.stderr)
        return 2
    print(Path(config.runs_dir) / config.name)
    print(config.health.stop_timeout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
