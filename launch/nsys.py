"""Start a rank, under NVIDIA's Nsight Systems if it is one of the chosen.

    python -m launch.nsys --ranks 0,8 --output runs/demo/nsys -- -m w1train.pretrain recipe=demo

Behind `--` are the arguments for Python. Neither launcher starts this by hand: `launch/torchrun.sh --nsys`, `launch.slurm --nsys`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command

_OPTIONS = (
    "--trace=cuda,nvtx,osrt,cublas,cudnn",
    # Sampling the CPU needs rights that clusters do not give, and adds nothing to ranges and kernels.
    "--sample=none",
    "--cpuctxsw=none",
    # Only the steps that the run marks (profiling.steps with profiling.tool=nsys): a whole run fills any disk. nsys goes on
    # after them, where its default would stop the rank.
    "--capture-range=cudaProfilerApi",
    "--capture-range-end=stop",
    "--force-overwrite=true",
)


def nsys_command(ranks: str | None, run: Path) -> list[str]:
    """What stands between `python` and its arguments in the command of every rank."""
    return [] if ranks is None else ["-m", "launch.nsys", "--ranks", ranks, "--output", str(run / "nsys"), "--"]


@command("launch.nsys")
def main(arguments: Sequence[str]) -> int:
    """Becomes the rank (exec), so that signals and the exit status are the rank's own. Exit status 2: nsys is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.nsys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", required=True, help="numbers separated by commas, or all")
    parser.add_argument("--output", required=True, type=Path, help="directory for the reports")
    parser.add_argument("command", nargs="+", help="arguments for Python, behind --")
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
