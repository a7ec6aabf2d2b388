"""The benchmark of the framework's step beside a bare PyTorch loop's step, on the CPU, in one process.

    python -m benchmarks.step.overhead --threads 1 --steps 20 --report
    python -m benchmarks.step.overhead recipe=demo schedule=masked model.num_layers=2 training.micro_batch_size=4

The *framework step* is ``Trainer.train_step`` as a run calls it, with one rank: the data loader with its threads, corruption, the attention
plan, megatron-core's schedule with gradient accumulation, its data-parallel gradient buffer and distributed optimizer, the reduction of the
metrics, the record in metrics.jsonl, the console (written to a file) and W&B (offline).

The *bare loop* is a loop as people write it by hand around the same DiffusionTransformer, without any wrapper, from the same initial
weights: forward pass, torch's cross-entropy at the masked positions times the objective's weight, backward pass into ``.grad``,
``clip_grad_norm_``, and ``torch.optim.AdamW(fused=True)`` with the same groups of weight decay. Its batches are the framework's, and are
read, corrupted and planned before the clock starts: the bare loop spends no time on data, and records nothing.

The steps of the two loops alternate, in another order each time (framework, bare; bare, framework; ...), so that other work of the machine
disturbs both equally. The losses of both are compared at every step, because the times of loops that compute different things cannot be
compared.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import logging
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common.results_page import Table, environment, spread, write_report
from benchmarks.common.synthetic import make_tokenizer, write_dataset
from w1train.config.argument_parser import ArgumentParser
from w1train.config.compose import load_config
from w1train.config.schema import Config
from w1train.runtime.megatron_on_cpu import import_megatron

if TYPE_CHECKING:
    from benchmarks.step.loops import Measurements

PARTS = {
    "data": "waiting for the loader",
    "corruption": "timesteps and masks",
    "plan": "attention plan and positions of the logits",
    "forward": "the module's forward",
    "loss": "cross-entropy, and the sums that are logged",
    "backward": "backward, and in the framework the move of each gradient into the buffer",
    "gradients": "zeroing, reducing and scaling gradients",
    "optimizer": "norm, clipping, AdamW",
    "metrics": "reducing and recording metrics",
    "rest": "everything else: the schedule's own work, mostly",
}
"""The parts of a step in their order, and their meanings."""


def benchmark_config(overrides: Sequence[str], directory: Path) -> Config:
    """Return the recipe's configuration with synthetic data. The data and the run are written to ``directory``."""
    prefix, tokenizer_path = directory / "data", directory / "tokenizer.json"
    own = {"name": "step_overhead", "runs_dir": directory, "data.train": prefix, "data.tokenizer": tokenizer_path}
    fixed = [f"{key}='{value}'" for key, value in own.items()]
    recipe = [] if any(override.startswith("recipe=") for override in overrides) else ["recipe=demo", "schedule=masked"]
    config = load_config([*recipe, "logging.wandb=offline", *overrides, *fixed, "data.validation=null"])
    tokenizer = make_tokenizer(config.model.vocab_size, config.diffusion.mask_token_id)
    tokenizer.save(tokenizer_path)
    # Documents four samples long at the median, as source files are in the demo: some samples hold a boundary, most do not.
    length = config.data.sequence_length
    write_dataset(prefix, tokenizer, num_tokens=max(1 << 18, 64 * length), median_document_length=4 * length)
    return config


def largest_loss_difference(framework: Measurements, bare: Measurements) -> float:
    """Return the largest relative difference between the losses of the two loops at a measured step."""
    return max(abs(a - b) / abs(b) for a, b in zip(framework.losses, bare.losses, strict=True))


def step_table(framework: Measurements, bare: Measurements) -> Table:
    """Return the table of the steps' medians with quartiles, and their ratios."""

    def row(name: str, ours: list[float], theirs: list[float]) -> tuple[str, ...]:
        paired = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ours) / statistics.median(theirs)
        return name, spread(ours, "{:.3f}"), spread(theirs, "{:.3f}"), f"{ratio:.3f}", spread(paired, "{:.3f}")

    rows = [
        row("wall", [step.wall for step in framework.steps], [step.wall for step in bare.steps]),
        row("processor", [step.cpu for step in framework.steps], [step.cpu for step in bare.steps]),
    ]
    return Table("Seconds a step: median (quartiles)", ("time", "framework", "bare loop", "ratio", "ratio of neighbours"), rows)


def part_table(framework: Measurements, bare: Measurements, clock: str, name: str) -> Table:
    """Return the table of the median time of each part, with the difference as a share of the bare step."""
    bare_step = statistics.median(getattr(step, clock) for step in bare.steps)
    rows = []
    for part in PARTS:
        ours, theirs = (
            statistics.median(getattr(parts[part], clock) if part in parts else 0.0 for parts in each.parts) for each in (framework, bare)
        )
        rows.append(
            (part, f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"{1e3 * (ours - theirs):+.2f}", f"{(ours - theirs) / bare_step:+.2%}")
        )
    return Table(f"Milliseconds of {name} time by part: medians", ("part", "framework", "bare loop", "difference", "of a step"), rows)


def _notes(config: Config, options: argparse.Namespace, difference: float) -> str:
    training, length = config.training, config.data.sequence_length
    parts = "\n".join(f"- {part}: {meaning}" for part, meaning in PARTS.items())
    return f"""\
A step is {training.global_batch_size} samples of {length} random tokens in micro-batches of {training.micro_batch_size},
{training.precision}, {options.threads} thread(s). {options.steps} steps of each loop, after {options.warmup} to warm up, alternate in
one process.

The framework step is `Trainer.train_step` with everything that a run does: data, corruption, attention plan, megatron-core's schedule,
gradient buffer and distributed optimizer, metrics, console (into a file), W&B (offline unless the command says otherwise).
The bare loop trains the same module by hand; its batches are read, corrupted and planned beforehand.
`benchmarks/step/overhead.py` says more.

Largest relative difference between the losses of the two loops at a step: {difference:.1e}.

{parts}"""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-step-overhead.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.step.overhead", description="Compare the framework's step with a bare PyTorch loop.")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe (recipe=demo schedule=masked unless a recipe is given)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads for both loops (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each loop (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each loop before the measured ones (default: 3)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import_megatron()
    from benchmarks.step.loops import compare

    with tempfile.TemporaryDirectory() as directory:
        config = benchmark_config(options.overrides, Path(directory))
        framework, bare = compare(config, num_steps=options.steps, num_warmup=options.warmup)
    difference = largest_loss_difference(framework, bare)
    tables = [
        step_table(framework, bare),
        part_table(framework, bare, "wall", "wall"),
        part_table(framework, bare, "cpu", "processor"),
    ]
    for table in tables:
        table.print()
    print(f"largest relative difference of the losses: {difference:.1e}")
    if options.report:
        tables.append(environment(shlex.join(["python", "-m", "benchmarks.step.overhead", *arguments])))
        path = write_report("step-overhead", "Framework step against a bare PyTorch loop", tables, _notes(config, options, difference))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
