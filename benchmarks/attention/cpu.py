"""The benchmark of attention on the CPU by rectangles of visible pairs, beside torch's dense attention with a mask.

    python -m benchmarks.attention.cpu --report
    python -m benchmarks.attention.cpu --length 1024 --repetitions 5

It measures the forward and backward pass of one layer's attention on random inputs: the rectangles of
w1train/attention/backends/rectangles.py and the dense kernel take turns. The plan of a micro-batch, which is made once for all layers, is
timed too. If the two results do not agree, nothing is reported.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.results_page import Table, environment, write_report
from w1train.attention.backends.rectangles import Rectangle
from w1train.attention.backends.sdpa import DensePlan, SdpaBackend
from w1train.attention.visibility import Visibility, block_diffusion_visibility, causal_visibility, document_visibility
from w1train.config.argument_parser import ArgumentParser
from w1train.config.rules.attention_limits import AttentionCase

_SEED = 1234
_AGREEMENT = 1e-5


@dataclass(slots=True)
class Comparison:
    """Processor seconds of one workload, with one entry for each repetition."""

    name: str
    visible_share: float
    num_rectangles: int
    """0 if the rule chose the dense kernel."""
    plan: float
    chosen: list[float]
    dense: list[float]

    def row(self) -> tuple[str, ...]:
        """Return the row of the table."""
        chosen, dense = statistics.median(self.chosen), statistics.median(self.dense)
        ratios = [one / other for one, other in zip(self.dense, self.chosen, strict=True)]
        how = f"{self.num_rectangles}" if self.num_rectangles else "dense"
        shown = (f"{self.visible_share:.1%}", how, f"{1e3 * self.plan:.1f}", f"{1e3 * chosen:.1f}", f"{1e3 * dense:.1f}")
        return (self.name, *shown, f"{statistics.median(ratios):.2f}")


def lognormal_documents(length: int, median: int, generator: torch.Generator) -> Tensor:
    """Return the document ids of one packed sample, int32 [1, l], whose last document is cut."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(max(1, round(median * math.exp(float(torch.randn(1, generator=generator))))))
    sizes[-1] -= sum(sizes) - length
    return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(sizes))[None]


def workloads(length: int) -> Iterator[tuple[str, Visibility]]:
    """Yield names and visibilities: one stream of documents, causal documents, and two streams of blocks."""
    generator = torch.Generator().manual_seed(_SEED)
    one = torch.zeros((1, length), dtype=torch.int32)
    many, short = (lognormal_documents(length, median, generator) for median in (length // 8, length // 32))
    yield "one document", document_visibility(one)
    yield f"documents of {length // 8}", document_visibility(many)
    yield f"documents of {length // 32}", document_visibility(short)
    yield "causal, one document", causal_visibility(one)
    yield f"causal, documents of {length // 8}", causal_visibility(many)
    for block_size in (4, 32, length // 4):
        yield f"blocks of {block_size}, one document", block_diffusion_visibility(one, block_size, "document")
    for block_size in (4, 32):
        yield f"blocks of {block_size}, documents of {length // 8}", block_diffusion_visibility(many, block_size, "document")


def compare(name: str, visibility: Visibility, case: AttentionCase, repetitions: int) -> Comparison:
    """Measure rectangles and dense kernel in turns. The times of their first turns are not kept."""
    backend, dense = SdpaBackend(case), SdpaBackend()
    started = time.process_time()
    plan: DensePlan | list[Rectangle] = backend.prepare(visibility)
    seconds = time.process_time() - started
    shapes = [(1, heads, size, case.channels) for heads, size in _sizes(visibility, case)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0])
    dense_plan = dense.prepare(visibility)
    query, key, value = inputs
    sides: list[Callable[[], Tensor]] = [
        lambda: backend.attend(query, key, value, plan),
        lambda: dense.attend(query, key, value, dense_plan),
    ]
    _require_agreement(name, [torch.autograd.grad(side(), inputs, upstream) for side in sides])
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repetitions):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            started = time.process_time()
            torch.autograd.grad(sides[index](), inputs, upstream)
            times[index].append(time.process_time() - started)
    pairs = visibility.endpoints.shape[2] * visibility.num_keys
    num_rectangles = len(plan) if isinstance(plan, list) else 0
    return Comparison(name, int(visibility.num_visible_pairs()) / pairs, num_rectangles, seconds, *times)


def _sizes(visibility: Visibility, case: AttentionCase) -> list[tuple[int, int]]:
    return [(case.num_heads, visibility.endpoints.shape[2]), *[(case.num_groups, visibility.num_keys)] * 2]


def _require_agreement(name: str, gradients: Sequence[Sequence[Tensor]]) -> None:
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= _AGREEMENT * other.norm(), f"{name}: the two do not compute the same"


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-attention-cpu.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.attention.cpu", description="Attention by rectangles against dense attention.")
    parser.add_argument("--length", type=int, default=4096, help="sequence length (default: 4096; two streams have twice the rows)")
    parser.add_argument("--heads", type=int, default=4, help="number of query heads (default: 4)")
    parser.add_argument("--groups", type=int, default=4, help="number of key/value heads (default: 4)")
    parser.add_argument("--channels", type=int, default=64, help="channels of a head (default: 64)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each side of each workload (default: 3)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(_SEED)
    case = AttentionCase("documents", "fp32", options.heads, options.groups, options.channels)
    rows = [compare(name, visibility, case, options.repetitions).row() for name, visibility in workloads(options.length)]
    columns = ("workload", "visible", "rectangles", "plan, ms", "chosen, ms", "dense, ms", "dense / chosen")
    table = Table("Forward and backward of one layer: medians of processor time", columns, rows)
    table.print()
    if options.report:
        notes = (
            f"One sample of {options.length} tokens in fp32, {options.heads} query heads of {options.channels} channels on "
            f"{options.groups} key/value heads, {options.threads} thread(s), {options.repetitions} repetitions in turns. "
            "`dense` is `scaled_dot_product_attention` with the boolean mask (without one where everything is visible); `chosen` is what "
            "the cost rule of `rectangles_of` takes. Ratios are medians over neighbouring repetitions."
        )
        tables = [table, environment(shlex.join(["python", "-m", "benchmarks.attention.cpu", *arguments]))]
        print(f"wrote {write_report('attention-cpu', 'Attention on the CPU: by rectangles against dense', tables, notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
