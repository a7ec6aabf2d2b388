"""The benchmark of attention on a GPU: every backend, and the dense kernels of the same libraries, in one run.

    python -m benchmarks.attention --report
    python -m benchmarks.attention --groups 4 --lengths 4096 8192
    python -m benchmarks.attention --device cpu --tiny

It measures the forward and backward pass of one layer on one sample, in bf16, with W1-4B's heads. All sides of a workload take turns on
the same random inputs. The result of the first turn is compared with an explicit softmax and its time is not kept; a side with another
result is reported as wrong and is not timed. A side that cannot compute a workload is a row with the reason. The workloads are in order
of importance, and the workloads that are left when --budget seconds are over are named.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.attention.attention_report import NOTES, chart, key_results, tables, verdicts
from benchmarks.attention.measure import Measured, measure_workload
from benchmarks.attention.sides import sides
from benchmarks.attention.workloads import Workload, tiny_workloads, workloads
from benchmarks.common.records import device_of, publish, record_of
from benchmarks.common.results_page import RESULTS
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.config.rules.attention_limits import AttentionCase

logger = logging.getLogger(__name__)

# The number of shapes that torch.compile accepts. Beyond its default of 8 it gives up compiling, and FlexAttention becomes unfused.
_COMPILED_SHAPES = 64


def measure(options: argparse.Namespace, device: torch.device) -> tuple[list[Measured], list[str]]:
    """Measure all sides of all workloads. Return the measurements, and the names of workloads for which there was no time."""
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = _COMPILED_SHAPES
        torch._dynamo.config.accumulated_recompile_limit = 4 * _COMPILED_SHAPES
    started = time.perf_counter()
    todo: list[Workload] = list(tiny_workloads() if options.tiny else workloads(options.lengths))
    case = AttentionCase("documents", "bf16", options.heads, options.groups or options.heads, options.channels)
    if options.tiny:
        case = AttentionCase("documents", "bf16", 2, 1 if options.groups else 2, 16)
    measured: list[Measured] = []
    done = 0
    try:
        for workload in todo:
            if time.perf_counter() - started > options.budget:
                break
            logger.info("%s (%.0f s)", workload.name, time.perf_counter() - started)
            of_workload = dataclasses.replace(case, kind=workload.kind)
            measured += measure_workload(workload, of_workload, sides(), device, options.repetitions)
            done += 1
    except KeyboardInterrupt:
        logger.warning("interrupted; the workloads that were measured are reported")
    return measured, [workload.name for workload in todo[done:]]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmarks.attention", description="Measure every attention backend side by side.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="use small shapes, which show that the benchmark works and not how fast anything is"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="lengths of samples in tokens (default: 4k to 32k)"
    )
    parser.add_argument("--heads", type=int, default=24, help="number of query heads (default: 24, as W1-4B)")
    parser.add_argument("--groups", type=int, default=None, help="number of key/value heads (default: as many as query heads)")
    parser.add_argument("--channels", type=int, default=128, help="channels of a head (default: 128)")
    parser.add_argument("--repetitions", type=int, default=10, help="turns of each side of each workload (default: 10)")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds after which no further workload is begun (default: 900)")
    parser.add_argument("--report", action="store_true", help="write the dated report with its JSON and plot")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the report (default: benchmarks/results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write YYYY-MM-DD-attention.md, .json and .svg. Return the exit status: 0, 1 if a side
    failed or is wrong, 2 for bad input."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = device_of(options)
    except UserError as error:
        print(f"benchmarks.attention: {error}", file=sys.stderr)
        return 2
    measured, left = measure(options, device)
    shown = tables(measured)
    # The tables of single workloads are for the report.
    shown[0].print()
    lines = [*verdicts(measured), *(f"not measured, out of time: {name}" for name in left)]
    print("\n".join(lines))
    if options.report:
        benchmark = f"attention-{options.groups}-groups" if options.groups else "attention"
        record = record_of(benchmark, key_results(measured), device, options, "benchmarks.attention", arguments)
        notes = f"{NOTES}\n\n" + "\n".join(f"- {line}" for line in lines)
        print(f"wrote {publish(record, 'Attention backends side by side', shown, notes, chart(measured), options.output)}")
    return 1 if any(row.failed for row in measured) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
