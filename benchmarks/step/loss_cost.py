"""The benchmark of the output head with each loss, forward and backward, on the CPU, in one process.

    python -m benchmarks.step.loss_cost --report
    python -m benchmarks.step.loss_cost --rows 256 --chunk-size 128 --threads 2

Each loss is computed by chunks over W1's vocabulary (64,512 ids of 2,048 channels, fp32), as the model's head computes it. The losses take
turns, in another order each time, so that other work of the machine disturbs all of them equally. Each ratio is the median of a loss,
divided by the median of the cross-entropy.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import shlex
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.common.results_page import Table, environment, spread, write_report
from w1train.config.argument_parser import ArgumentParser
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import CrossEntropy, FiniteKl, KlIs, RowTerm, ScoreEntropy, Vocabulary

_BASELINE = "cross_entropy"
_STEP = 1e-3
"""The length of a step of ``finite_kl`` in t."""


def losses(num_rows: int, vocab_size: int) -> dict[str, list[RowTerm]]:
    """Return the terms of each loss, for uniform noise at random t. Only the first term of each list has a gradient."""
    targets, inputs = torch.randint(0, vocab_size, (2, num_rows))
    timesteps = 0.1 + 0.8 * torch.rand(num_rows, dtype=torch.float64)
    earlier = timesteps - _STEP
    alpha, noise = 1 - timesteps, timesteps / vocab_size
    kl_is = KlIs(targets, inputs, alpha, noise, noise)
    full = KlIs(targets, inputs, alpha, noise, noise, (1 + alpha / noise).log())
    before = earlier / vocab_size
    return {
        _BASELINE: [CrossEntropy(targets)],
        "kl_is": [kl_is],
        "kl_is, and cross-entropy for the log": [kl_is, CrossEntropy(targets)],
        "kl_is of a full prediction": [full],
        "finite_kl": [FiniteKl(targets, inputs, alpha, noise, 1 - earlier, before, before)],
        "score_entropy": [ScoreEntropy(targets, inputs, alpha, noise, noise, torch.zeros(num_rows))],
    }


type Seconds = dict[str, list[tuple[float, float]]]
"""Wall and processor seconds of each turn, by loss."""


def measure(options: argparse.Namespace) -> Seconds:
    """Return the seconds of each turn of each loss, after a turn of each to warm up."""
    rows = torch.randn((options.rows, options.hidden_size), requires_grad=True)
    weight = (0.02 * torch.randn((options.vocab_size, options.hidden_size))).requires_grad_()
    head = Head(Vocabulary(None, 0, None), options.chunk_size, sum_row_gradients=True)
    every = losses(options.rows, options.vocab_size)
    seconds: Seconds = {name: [] for name in every}
    names = list(every)
    for turn in range(options.turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = _seconds(rows, weight, every[name], head)
            if turn:
                seconds[name].append(taken)
    return seconds


def _seconds(rows: torch.Tensor, weight: torch.Tensor, terms: Sequence[RowTerm], head: Head) -> tuple[float, float]:
    rows.grad = weight.grad = None
    wall, cpu = time.perf_counter(), time.process_time()
    linear_row_terms(rows, weight, terms, head)[0].sum().backward()
    return time.perf_counter() - wall, time.process_time() - cpu


def table_of(seconds: Seconds) -> Table:
    """Return the table of the losses' times, with the ratios of medians to the cross-entropy."""
    rows = []
    for name, times in seconds.items():
        cells = []
        for own, baseline in zip(zip(*times, strict=True), zip(*seconds[_BASELINE], strict=True), strict=True):
            cells += [spread(own, "{:.3f}"), f"{statistics.median(own) / statistics.median(baseline):.3f}"]
        rows.append((name, *cells))
    columns = ("loss", "wall time", "ratio", "processor time", "ratio")
    return Table("Seconds of head and loss, forward and backward: median (quartiles)", columns, rows)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-loss-cost.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.step.loss_cost", description="Measure the output head with each loss on the CPU.")
    parser.add_argument("--rows", type=int, default=128, help="rows that have a loss (default: 128)")
    parser.add_argument("--chunk-size", type=int, default=64, help="rows whose logits exist at once (default: 64)")
    parser.add_argument("--hidden-size", type=int, default=2048, help="channels (default: 2048)")
    parser.add_argument("--vocab-size", type=int, default=64512, help="ids (default: 64512)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each loss (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1234)
    table = table_of(measure(options))
    table.print()
    if options.report:
        notes = (
            f"Head and loss of {options.rows} rows in chunks of {options.chunk_size}, {options.vocab_size} ids of {options.hidden_size} "
            f"channels, fp32, {options.threads} thread(s). {options.turns} turns of each loss alternate in one process, after one turn of "
            f"each to warm up. The noise is uniform, and a step of `finite_kl` is {_STEP:g} long. The ratio is the median divided by "
            f"that of the cross-entropy."
        )
        tables = [table, environment(shlex.join(["python", "-m", "benchmarks.step.loss_cost", *arguments]))]
        print(f"wrote {write_report('loss-cost', 'Cost of the losses beside the cross-entropy', tables, notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
