"""The command that checks the kernels of this machine: relative errors of outputs and gradients, tensor by tensor.

    python -m benchmarks.correctness
    python -m benchmarks.correctness --device cpu --tiny

It compares every attention backend with an explicit softmax in fp32, on packed samples with padding and under every kind of mask, and every
Triton kernel with its PyTorch twin in fp32. In bf16, an error of 1e-2 is allowed. A kernel that cannot run here is a row with the reason.
The exit status is 1 if a kernel is wrong. The tests marked gpu (`make test-gpu`) check more.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.machine import describe, gpu_environment, open_device, versions
from benchmarks.common.results_page import RESULTS, Table, write_report
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.diagnosis.kernel_checks import TOLERANCE, attention_checks, kernel_checks


def main(arguments: Sequence[str]) -> int:
    """Run the checks, and with ``--report`` write YYYY-MM-DD-correctness.md. Return the exit status: 0, 1 if a kernel is wrong, 2 for bad
    input."""
    parser = ArgumentParser(prog="benchmarks.correctness", description="Check the kernels of this machine against references.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use small shapes")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the report (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    try:
        device = open_device(options.device)
    except UserError as error:
        print(f"benchmarks.correctness: {error}", file=sys.stderr)
        return 2
    length, channels, kernel_sizes = (128, 16, (64, 32, 96)) if options.tiny else (1024, 128, (4096, 2048, 64512))
    checks = [*attention_checks(device, length, channels), *kernel_checks(device, *kernel_sizes)]
    table = Table(
        f"Relative errors in bf16 ({TOLERANCE:g} is allowed)",
        ("kernel", "verdict", "output", "gradients of the inputs"),
        [check.row() for check in checks],
    )
    table.print()
    wrong, ran = [check for check in checks if not check.passed], [check for check in checks if check.errors]
    summary = f"{len(ran)} of {len(checks)} checks ran on {describe(device)['device']}; {len(wrong)} are wrong"
    print(summary)
    if options.report:
        command = shlex.join(["python", "-m", "benchmarks.correctness", *arguments])
        shown = [table, gpu_environment(command, describe(device), versions())]
        print(f"wrote {write_report('correctness', 'Kernels against references', shown, summary + '.', options.output)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
