"""The tables, plot and notes of benchmarks.step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.common.plot import Bar, bar_chart
from benchmarks.common.records import Results
from benchmarks.common.results_page import Table
from benchmarks.step.step_run import Run

GOALS = {1: 0.60, 2: 0.55}
"""The MFU to reach by number of streams, on one H100 or H800."""


def tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables of speeds, of shares by kernel group, and of the slowest kernels of the runs with most layers."""
    kernels = [_kernels(run) for run in runs if run.largest and run.reason is None]
    return [_speed(runs), _breakdown(runs), *kernels]


def _speed(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        if run.reason is not None:
            rows.append((f"{run.name}: {run.reason}".replace("|", "/"), *[""] * 6))
            continue
        found = run.found
        mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
        numbers = (f"{1e3 * found['seconds']:.1f}", f"{found['tokens_per_second']:,.0f}", f"{found['tflops']:.3g}", mfu)
        rows.append((run.name, found["backend"], *numbers, f"{found['memory_gib']:.1f}"))
    columns = ("run", "attention", "step, ms", "tokens/s", "model TFLOP/s", "MFU", "memory, GiB")
    return Table("A step: medians", columns, rows)


def shares(run: Run) -> dict[str, float]:
    """Return shares of the measured step: each group's kernels in the profiled step, and the time in which no kernel ran."""
    found = run.found
    groups = {name: seconds / found["seconds"] for name, seconds in found["groups"].items()}
    return {**groups, "idle": max(0.0, 1.0 - found["busy"] / found["seconds"])}


def _breakdown(runs: Sequence[Run]) -> Table:
    measured = [run for run in runs if run.reason is None]
    names = list(shares(measured[0])) if measured else []
    rows = [(run.name, *(f"{share:.1%}" for share in shares(run).values())) for run in measured]
    return Table("Shares of a step by kernel group", ("run", *names), rows)


def _kernels(run: Run) -> Table:
    rows = [(kernel[:90].replace("|", "/"), group, f"{1e3 * seconds:.2f}") for group, kernel, seconds in run.found["largest"]]
    return Table(f"Kernels that take most: {run.name}", ("kernel", "group", "ms a step"), rows)


def key_results(runs: Sequence[Run]) -> Results:
    """Return the results that are compared with other runs."""
    results: Results = {}
    for run in runs:
        if run.reason is None:
            found = run.found
            # The number of layers that fit may change, and the results must still be compared.
            name = run.name if not run.largest else run.name.rpartition(",")[0] + ", most layers"
            numbers = {"step_ms": 1e3 * found["seconds"], "mfu": found["mfu"], "tokens_per_second": found["tokens_per_second"]}
            parts = {f"{group} share": share for group, share in shares(run).items()}
            layers = {"layers": float(run.layers)} if run.largest else {}
            results[name] = {**layers, **numbers, "memory_gib": found["memory_gib"], **parts}
    return results


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Return a line for each number of streams, which compares the MFU with most layers with its goal."""
    lines = []
    for streams, goal in GOALS.items():
        run = next((run for run in runs if run.streams == streams and run.largest and run.reason is None), None)
        claim = f"{'one stream' if streams == 1 else 'two streams'}: MFU >= {goal:.0%}"
        if run is None or run.found["mfu"] is None:
            lines.append(f"not shown: {claim}")
        else:
            mfu = run.found["mfu"]
            lines.append(f"{'holds' if mfu >= goal else 'DOES NOT HOLD'}: {claim}: {mfu:.1%} with {run.layers} of 48 layers")
    return lines


def notes(options: argparse.Namespace, runs: Sequence[Run]) -> str:
    """Return the text above the tables, which says what was compared with what."""
    lines = "\n".join(f"- {line}" for line in verdicts(runs))
    return f"""\
A step is `Trainer.train_step` of recipe=w1_4b on one device: {options.micro_batches} micro-batch(es) of {options.micro_batch_size}
sample(s), AdamW on all of the model's states included (on many devices each has its part alone). Documents are random tokens, four
samples long at the median; gates start at 1, as zeros would make the backward products faster. {options.steps} steps after
{options.warmup} to warm up; then one under the profiler, whose kernels are put in groups. *Idle* is the measured step without the time in
which the profiled one ran any kernel. Streams may overlap, so shares need not add up to 1.

MFU counts what must be computed (w1train/model/flops.py: visible pairs, logits where a loss is taken, nothing twice) against the
device's dense bf16 peak. *Unfused* keeps its scores in bf16 and computes them again in the backward pass, as all layers' do not
fit. *Kernels off* has plain PyTorch for norms, modulation, gates, rotary embedding and SwiGLU. Memory is the peak of what tensors hold.

{lines}"""


def chart(runs: Sequence[Run]) -> str:
    """Return a chart of the milliseconds of a step by kernel group, as SVG."""
    groups = []
    for streams, heading in ((1, "one stream"), (2, "two streams")):
        bars = []
        for run in runs:
            if run.streams == streams and run.reason is None:
                pieces = [(name, 1e3 * share * run.found["seconds"]) for name, share in shares(run).items()]
                mfu = "" if run.found["mfu"] is None else f"{run.found['mfu']:.1%}"
                bars.append(Bar(f"{run.variant}, {run.layers} layers", pieces, mfu))
        groups.append((heading, bars))
    return bar_chart("A training step by kernel group", groups, "ms a step; at the end: MFU")
