"""The command that starts a rank, under NVIDIA's Nsight Systems if it is one of the chosen ranks.

    python -m launch.nsys --ranks 0,8 --output runs/demo/nsys -- -m w1train.pretrain recipe=demo

The arguments for Python come after `--`. `launch/torchrun.sh --nsys` and `launch.slurm --nsys` start ranks with this command.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from w1train.config.argument_parser import ArgumentParser
from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command

_OPTIONS = (
    "--trace=cuda,nvtx,osrt,cublas,cudnn",
    # Sampling of the CPU needs rights that clusters do not give, and adds nothing to ranges and kernels.
    "--sample=none",
    "--cpuctxsw=none",
    # Record only the steps that the run marks (profiling.steps with profiling.tool=nsys): a whole run would fill any disk. After these
    # steps the recording stops and the rank continues. By default nsys would stop the rank too.
    "--capture-range=cudaProfilerApi",
    "--capture-range-end=stop",
    "--force-overwrite=true",
)


def nsys_command(ranks: str | None, run: Path) -> list[str]:
    """Return the words between `python` and its arguments in the command of every rank."""
    return [] if ranks is None else ["-m", "launch.nsys", "--ranks", ranks, "--output", str(run / "nsys"), "--"]


@command("launch.nsys")
def main(arguments: Sequence[str]) -> int:
    """Run the command: become the rank by exec, so that signals reach the rank and the exit status is the rank's own. Return 2 if nsys is
    not on PATH."""
    parser = ArgumentParser(prog="python -m launch.nsys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", required=True, help="ranks to profile: numbers separated by commas, or all")
    parser.add_argument("--output", required=True, type=Path, help="directory for the reports")
    parser.add_argument("command", nargs="+", help="arguments for Python, after --")
    options = parser.parse_args(arguments)
    discover_ranks()
    rank = os.environ.get("RANK", "0")
    command = [sys.executable, *options.command]
    if options.ranks != "all" and rank not in options.ranks.split(","):
        os.execv(command[0], command)
    if shutil.which("nsys") is None:
        print("launch.nsys: nsys is not on PATH: it comes with the CUDA toolkit and with NVIDIA's containers", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    os.execvp("nsys", ["nsys", "profile", *_OPTIONS, f"--output={options.output}/rank_{int(rank):05d}", *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
