"""The benchmark of a training step of W1-4B on one GPU: its MFU, its time by kernel group, and the gain from each kernel.

    python -m benchmarks.step --report
    python -m benchmarks.step --micro-batches 8 --budget 1200
    python -m benchmarks.step --device cpu --tiny

The step is ``Trainer.train_step`` of recipe=w1_4b with everything that a run does, on synthetic documents: masked diffusion (one stream),
and blocks of 32 (two streams). Each run is a process of its own. Runs with --side-layers layers and with half as many show the memory of a
layer. The number of the 48 layers that fit follows from it, and MFU is measured with this number. Further runs have --side-layers layers
and torch's FlexAttention, unfused attention, or this project's fused kernels switched off. The runs are in order of importance, and those
for which --budget seconds are too few are named.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import dataclasses
import json
import logging
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.records import device_of, publish, record_of
from benchmarks.common.results_page import RESULTS
from benchmarks.common.synthetic import make_tokenizer, write_dataset
from benchmarks.step.step_report import chart, key_results, notes, tables, verdicts
from benchmarks.step.step_run import Run, Variant
from w1train.config.argument_parser import ArgumentParser
from w1train.config.compose import load_config
from w1train.config.errors import UserError, raise_if_any
from w1train.config.rules.validate import validate
from w1train.config.schema import Config

logger = logging.getLogger(__name__)

OVERRIDES: dict[Variant, list[str]] = {
    "recipe": [],
    "flex": ["attention.backend=flex"],
    # The scores of unfused attention fit only if they are computed again in the backward pass.
    "unfused": ["attention.backend=reference", "parallel.recompute=selective"],
    "kernels off": ["kernels.elementwise=torch", "kernels.rope=unfused", "kernels.swiglu=unfused"],
}
TINY = [
    *("model.vocab_size=512", "model.hidden_size=32", "model.num_attention_heads=2", "model.kv_channels=16"),
    *("model.ffn_hidden_size=48", "data.sequence_length=64", "training.loss_chunk_size=32"),
]
_LENGTH_OF_BLOCKS = 32
_SHARE_OF_MEMORY = 0.92
_FEWER_LAYERS, _ATTEMPTS = 4, 3
_LONGEST_RUN = 240.0
_NOT_DONE = f"not done after {_LONGEST_RUN:.0f} s"


def step_config(run: Run, options: argparse.Namespace, directory: Path) -> Config:
    """Return the recipe's configuration with the changes of the run."""
    own = {
        "name": f"step_{time.time_ns()}",
        "runs_dir": directory,
        "data.train": directory / "data",
        "data.tokenizer": directory / "tokenizer.json",
    }
    overrides = [
        "recipe=w1_4b",
        f"model.num_layers={run.layers}",
        # Gates that start at zero would let no gradient into the layers. Products with zeros take less power, and so less time.
        "model.adaln_init=identity",
        "data.validation=null",
        "logging.wandb=disabled",
        f"training.micro_batch_size={options.micro_batch_size}",
        f"training.global_batch_size={options.micro_batches * options.micro_batch_size}",
        *([f"diffusion.block_size={_LENGTH_OF_BLOCKS}"] if run.streams == 2 else []),
        *OVERRIDES[run.variant],
        *(TINY if options.tiny else []),
        *options.overrides,
        *(f"{key}='{value}'" for key, value in own.items()),
    ]
    config = load_config(overrides)
    raise_if_any(validate(config, world_size=1))
    return config


def write_data(options: argparse.Namespace, directory: Path) -> None:
    """Write a dataset of random tokens, in documents that are four samples long at the median."""
    config = step_config(Run(1, "recipe", 1), options, directory)
    tokenizer = make_tokenizer(config.model.vocab_size, config.diffusion.mask_token_id)
    tokenizer.save(directory / "tokenizer.json")
    length = config.data.sequence_length
    write_dataset(directory / "data", tokenizer, num_tokens=256 * length, median_document_length=4 * length)


def measure(options: argparse.Namespace, directory: Path, run_apart: Callable[[Run, argparse.Namespace, Path, float], None]) -> list[Run]:
    """Return all runs, including those for which there was no time."""
    started = time.perf_counter()
    done: list[Run] = []

    def perform(run: Run) -> Run:
        left = options.budget - (time.perf_counter() - started)
        if left > 0:
            logger.info("%s (%.0f s)", run.name, options.budget - left)
            run_apart(run, options, directory, min(left, _LONGEST_RUN))
            if run.reason == _NOT_DONE and left < _LONGEST_RUN:
                run.reason, run.failed = "out of time", False
        else:
            run.reason = "out of time"
        done.append(run)
        return run

    some, half = options.side_layers, max(1, options.side_layers // 2)
    for streams in (1, 2):
        side, smaller = (perform(Run(streams, "recipe", layers)) for layers in (some, half))
        layers = min(options.layers, layers_that_fit(side, smaller))
        for _ in range(_ATTEMPTS if layers > some else 0):
            largest = perform(Run(streams, "recipe", layers, largest=True))
            layers -= _FEWER_LAYERS
            if largest.reason is None or "OutOfMemory" not in largest.reason or layers <= some:
                break
    for variant in ("flex", "unfused", "kernels off"):
        for streams in (2, 1):
            perform(Run(streams, variant, some))
    return done


def layers_that_fit(side: Run, smaller: Run) -> int:
    """Return the number of layers that fit, from the peak memory of runs with two numbers of layers. It is one more than the larger number
    if memory is not known (on the CPU), and 0 if a run failed."""
    if side.reason is not None or smaller.reason is not None:
        return 0
    if side.found["capacity_gib"] is None or side.layers == smaller.layers:
        return side.layers + 1
    of_layer = (side.found["memory_gib"] - smaller.found["memory_gib"]) / (side.layers - smaller.layers)
    free = _SHARE_OF_MEMORY * side.found["capacity_gib"] - side.found["memory_gib"]
    return side.layers + int(free / of_layer)


def run_in_process(run: Run, options: argparse.Namespace, directory: Path, seconds: float) -> None:
    """Fill ``run.found`` or ``run.reason`` by a process of its own: a crash, or memory that a run does not free, must not affect the
    next."""
    result = directory / "found.json"
    result.unlink(missing_ok=True)
    spec = json.dumps(dataclasses.asdict(run))
    command = [sys.executable, "-m", "benchmarks.step", *options.arguments, "--one", spec, "--directory", str(directory)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        run.reason, run.failed = _NOT_DONE, True
        return
    if result.exists():
        found = json.loads(result.read_text())
        run.reason = found.get("cannot")
        run.found = {} if run.reason else found
        return
    lines = [line for line in ended.stderr.strip().splitlines() if line.strip()] or [f"status {ended.returncode}"]
    logger.warning("%s failed:\n%s", run.name, "\n".join(lines[-25:]))
    # The last line of the traceback names the error. NCCL and other libraries may log after it.
    run.reason, run.failed = next((line for line in reversed(lines) if "Error" in line), lines[-1])[:160], True


def run_one(options: argparse.Namespace) -> int:
    """Measure one run in this process, and write found.json. Return the exit status."""
    from w1train.runtime.logs import set_up_logging
    from w1train.runtime.megatron_on_cpu import import_megatron

    set_up_logging()
    import_megatron()
    from benchmarks.step.run import measure_run

    run = Run(**json.loads(options.one))
    config = step_config(run, options, options.directory)
    try:
        found = measure_run(config, unfused=run.variant == "unfused", num_warmup=options.warmup, num_steps=options.steps)
    except UserError as error:
        found = {"cannot": str(error)}
    (options.directory / "found.json").write_text(json.dumps(found))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="benchmarks.step", description="Measure a training step of W1-4B, and its parts.")
    parser.add_argument("overrides", nargs="*", help="further overrides of recipe=w1_4b, for all runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="use a small model, which shows that the benchmark works and not how fast anything is"
    )
    parser.add_argument("--layers", type=int, default=48, help="largest number of layers (default: 48)")
    parser.add_argument("--side-layers", type=int, default=8, help="layers of the runs that are compared (default: 8)")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a step (default: 4)")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="samples of a micro-batch (default: 1, as in the recipe)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default: 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--budget", type=float, default=1500.0, help="seconds for all runs (default: 1500)")
    parser.add_argument("--report", action="store_true", help="write the dated report with its JSON and plot")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the report (default: benchmarks/results)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(arguments)
    if options.tiny:
        options.side_layers = 2
    return options


def main(arguments: Sequence[str], run_apart: Callable[[Run, argparse.Namespace, Path, float], None] = run_in_process) -> int:
    """Run the benchmark, and with ``--report`` write YYYY-MM-DD-step.md, .json and .svg. Return the exit status: 0, 1 if a run failed, 2
    for bad input."""
    options = _parse(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.one:
        return run_one(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = device_of(options)
        with tempfile.TemporaryDirectory() as directory:
            write_data(options, Path(directory))
            runs = measure(options, Path(directory), run_apart)
    except UserError as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        return 2
    shown = tables(runs)
    for table in shown[:2]:
        table.print()
    print("\n".join(verdicts(runs)))
    if options.report:
        record = record_of("step", key_results(runs), device, options, "benchmarks.step", arguments)
        print(f"wrote {publish(record, 'A training step of W1-4B', shown, notes(options, runs), chart(runs), options.output)}")
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
