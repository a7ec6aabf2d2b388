"""The command that averages a run's best checkpoints, and says whether the average is better than these checkpoints.

    w1train average RUN --top-k 5
    w1train average RUN --steps 100,200,300 --no-evaluate
    w1train average RUN --top-k 3 --output runs/other/checkpoints/step_0000000300

The average is written to RUN/checkpoints/average_..., where `--checkpoint average` of w1train.sample and w1train.evaluate finds it. No
run resumes from it by itself. The comparison is written to RUN/metrics.jsonl and summary.json. With --output, the average is written
elsewhere and nothing is recorded, which also works while the run is training. If the directory has the name of a step, the run of that
directory resumes from it, also with the states of the optimizer.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w1train.config.argument_parser import ArgumentParser, number_in
from w1train.config.constraints import Range
from w1train.config.errors import UserError
from w1train.config.serialization import config_from_yaml
from w1train.registered_names import require_registered_names
from w1train.runtime.command import command, describe_error


@command("w1train average")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 1 for a damaged checkpoint or a full disk, 2 for bad input; the reason is on stderr."""
    args = _parse(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("w1train").setLevel(logging.INFO)
    if not (args.run / "config.yaml").is_file():
        print(f"error: {args.run} is not a run directory: it has no config.yaml", file=sys.stderr)
        return 2
    # megatron-core takes seconds to import, which --help and a mistyped RUN should not wait for.
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    from w1train.checkpoints.manifest import CheckpointError
    from w1train.evaluation.averages import AverageRequest, average_run
    from w1train.records.average_comparison import comparison_lines

    request = AverageRequest(args.run, args.top_k, args.metric, args.steps, args.output, not args.no_evaluate, args.validation)
    try:
        require_registered_names(config_from_yaml(args.run / "config.yaml"), args.run / "config.yaml")
        path, comparison = average_run(request)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"path": str(path), **(comparison or {})}
    print(json.dumps(result) if args.json else "\n".join(comparison_lines(comparison) if comparison else [str(path)]))
    return 0


def _steps(text: str) -> list[int]:
    steps = [int(part) for part in text.split(",")]
    if len(set(steps)) < 2 or len(set(steps)) < len(steps):
        raise argparse.ArgumentTypeError("two or more different steps, as in 100,200")
    return sorted(steps)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="w1train average", description="Average the best checkpoints of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    members = parser.add_mutually_exclusive_group()
    members.add_argument(
        "--top-k",
        type=number_in(int, Range(2)),
        metavar="K",
        help="number of best checkpoints to average (default: the run's checkpoint.keep_best)",
    )
    members.add_argument("--steps", type=_steps, metavar="N,N", help="average the checkpoints of these steps instead")
    parser.add_argument(
        "--metric",
        choices=["elbo", "masked_cross_entropy"],
        help="metric that says which are best (default: the run's checkpoint.best_metric)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory to write, instead of RUN/checkpoints/average_...")
    parser.add_argument("--validation", metavar="PREFIX", help="compare on this validation set instead of the run's, and do not record it")
    parser.add_argument("--no-evaluate", action="store_true", help="do not compare the average with its members")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())
