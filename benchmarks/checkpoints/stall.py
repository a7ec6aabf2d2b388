"""The benchmark of how long training waits for a checkpoint: a save in the background, beside a save that training waits for.

    python -m benchmarks.checkpoints.stall --report
    python -m benchmarks.checkpoints.stall --directory /dev/shm --rounds 3

One rank trains a model of W1's shape with 200 million parameters, in bf16 with fp32 master weights and moments (14 bytes for each parameter
in the checkpoint). Each round saves the same state twice: *waited for* (``checkpoint.asynchronous=false``), then *in the background*, with
training steps until the checkpoint is complete. The bytes of the two checkpoints' shards are compared by their hashes. The first round is
reported apart, because it allocates the memory that later rounds use again.

The stall is the time that ``CheckpointSaver.save`` takes in the training loop. Between saves, steps run without a save, for comparison.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import json
import logging
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.common.results_page import Table, environment, spread, write_report
from w1train.config.argument_parser import ArgumentParser
from w1train.config.compose import load_config
from w1train.config.schema import Config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.checkpoint_names import step_path  # noqa: E402
from w1train.checkpoints.manifest import Progress, read_manifest, size_of  # noqa: E402
from w1train.checkpoints.saver import CheckpointSaver  # noqa: E402
from w1train.data.batch import PackedBatch  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import TrainedModel, build_trained_model  # noqa: E402
from w1train.model.flops import num_parameters  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402

MODEL = (
    "model.vocab_size=16384",
    "model.num_layers=12",
    "model.hidden_size=1024",
    "model.num_attention_heads=16",
    "model.kv_channels=64",
    "model.ffn_hidden_size=3072",
    "model.condition_size=256",
    "model.max_sequence_length=128",
    "data.sequence_length=128",
    "training.micro_batch_size=1",
    "training.global_batch_size=1",
    "training.precision=bf16",
    "diffusion.num_strata=1",
)
_LIMIT = 0.10
"""The bound of the stall, as a share of the time of the save that training waits for."""


@dataclass(slots=True)
class Measurements:
    """Seconds by round."""

    waited: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    background: list[float] = field(default_factory=list)
    steps_alone: list[float] = field(default_factory=list)
    steps_beside: list[float] = field(default_factory=list)
    num_bytes: int = 0


class Training:
    """Training of a model on random tokens, step by step."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, build_trained_model(config)
        self.step_number = 0

    def step(self) -> float:
        """Train one step, and return its seconds."""
        started = time.perf_counter()
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.model.optimizer.zero_grad()
        run_micro_batches(self.config, list(self.model.chunks), self._batches(), 1, training=True)
        for group in self.model.optimizer.param_groups:
            group["lr"] = 1e-4
        self.model.optimizer.step()
        self.step_number += 1
        return time.perf_counter() - started

    def _batches(self) -> Iterator:
        length = self.config.data.sequence_length
        generator = torch.Generator().manual_seed(self.step_number)
        tokens = torch.randint(16, self.config.model.vocab_size, (1, length), generator=generator)
        documents, positions = torch.zeros(1, length, dtype=torch.int32), torch.arange(length, dtype=torch.int32)[None]
        yield corrupt(PackedBatch(tokens, documents, positions, torch.tensor([self.step_number])), self.config.diffusion, 1)


def measure(training: Training, directory: Path, num_rounds: int, steps_between: int) -> Measurements:
    """Save ``num_rounds`` times in each way into ``directory``, and return the times."""
    found = Measurements()
    savers = {kind: _saver(training.model, directory / kind, training.config, kind) for kind in ("waited", "background")}
    for number in range(num_rounds):
        for _ in range(steps_between):
            found.steps_alone.append(training.step())
            savers["background"].poll()
        progress = Progress(step=training.step_number)
        found.waited.append(_seconds(savers["waited"], progress))
        found.stalls.append(_seconds(savers["background"], progress))
        started = time.perf_counter()
        while savers["background"].is_saving:
            found.steps_beside.append(training.step())
            savers["background"].poll()
        found.background.append(time.perf_counter() - started)
        _require_same(step_path(directory / "waited", progress.step), step_path(directory / "background", progress.step))
        found.num_bytes = size_of(step_path(directory / "waited", progress.step))
        print(f"round {number + 1}: waited {found.waited[-1]:.2f} s, stall {found.stalls[-1]:.3f} s", flush=True)
    for saver in savers.values():
        saver.close()
    return found


def _saver(model: TrainedModel, directory: Path, config: Config, kind: str) -> CheckpointSaver:
    directory.mkdir()
    settings = replace(config.checkpoint, asynchronous=kind == "background", keep=1, on_error="stop", upload=None)
    return CheckpointSaver(directory, model, settings, "")


def _seconds(saver: CheckpointSaver, progress: Progress) -> float:
    started = time.perf_counter()
    saver.save(progress)
    return time.perf_counter() - started


def _require_same(one: Path, other: Path) -> None:
    """Assert that both kinds of save have written the same bytes, although steps changed the state during one of them."""
    shards = [{name: entry for name, entry in read_manifest(path)["files"].items() if name.endswith(".shards")} for path in (one, other)]
    assert shards[0] == shards[1] != {}, f"{one} and {other} hold different states"


def tables(found: Measurements, config: Config) -> list[Table]:
    """Return the tables of the measurements: one for the first round, and one for the later rounds."""
    ratios = [stall / waited for stall, waited in zip(found.stalls, found.waited, strict=True)]
    slower = statistics.mean(found.steps_beside) / statistics.mean(found.steps_alone) - 1 if found.steps_beside else 0.0
    saves = [
        ("save that is waited for, s", f"{found.waited[0]:.2f}", spread(found.waited[1:], "{:.2f}")),
        ("stall of the save in the background, s", f"{found.stalls[0]:.3f}", spread(found.stalls[1:], "{:.3f}")),
        ("stall / save that is waited for", f"{100 * ratios[0]:.1f} %", spread([100 * ratio for ratio in ratios[1:]], "{:.1f} %")),
        ("in the background until it is complete, s", f"{found.background[0]:.2f}", spread(found.background[1:], "{:.2f}")),
    ]
    steps = [
        ("alone", str(len(found.steps_alone)), f"{statistics.mean(found.steps_alone):.3f}", ""),
        ("beside a save", str(len(found.steps_beside)), f"{statistics.mean(found.steps_beside):.3f}", f"{100 * slower:+.0f} %"),
    ]
    size = f"{num_parameters(config.model):,} parameters, {found.num_bytes / 2**30:.2f} GiB on the disk"
    return [
        Table(f"Saves of {size}: first, then median (quartiles) of {len(found.waited) - 1} later ones", ("", "first", "later"), saves),
        Table("Steps", ("", "number", "mean seconds", "longer by"), steps),
    ]


def main(arguments: list[str]) -> int:
    """Run the benchmark. Return the exit status: 0, or 1 if the stall is above its limit."""
    parser = ArgumentParser(prog="python -m benchmarks.checkpoints.stall", description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides over the model of 200 million parameters")
    parser.add_argument("--rounds", type=int, default=6, help="number of saves of each kind (default: %(default)s)")
    parser.add_argument("--steps-between", type=int, default=3, help="steps without a save before each round (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, help="directory of the checkpoints, which are removed at the end (default: a temporary directory)"
    )
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-checkpoint-stall.md")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    config = load_config(["recipe=demo", *MODEL, *args.overrides], [])
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=args.directory))
    try:
        with distributed(config.parallel):
            found = measure(Training(config), directory, args.rounds, args.steps_between)
            results = tables(found, config)
    finally:
        shutil.rmtree(directory)
    command = shlex.join(["python", "-m", "benchmarks.checkpoints.stall", *arguments])
    results.append(environment(command))
    for table in results:
        table.print()
    if args.report:
        print(write_report("checkpoint-stall", "Stall of a checkpoint", results, _notes(args.directory)))
    stall = statistics.median(s / w for s, w in zip(found.stalls[1:], found.waited[1:], strict=True))
    print(json.dumps({"stall_share": stall, "limit": _LIMIT}))
    return 0 if stall < _LIMIT else 1


def _notes(directory: Path | None) -> str:
    where = "a temporary directory" if directory is None else str(directory)
    return f"""\
A save in the background beside one that is waited for, of the same state, in turn, into {where}; {torch.get_num_threads()} threads. The
shards' bytes were the same in each round. Between rounds and beside the background saves the model trains.
`benchmarks/checkpoints/stall.py` says more. The stall must be below {100 * _LIMIT:.0f} % of the save that is waited for, at the
median of all saves but the first."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
