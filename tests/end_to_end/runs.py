"""A tiny run: data made by the real commands, a recipe in a user's directory, and training in forked ranks.

Imports of torch and megatron-core cost ten seconds a process, training here a second or two: the ranks are forked from the
test's process, where everything is imported once (tests/distributed.py says why that is safe).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.distributed import free_port
from tests.forking import prepare_to_fork, rank_environment
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from data_tools import tokenize, train_tokenizer  # noqa: E402
from w1train import pretrain  # noqa: E402
from w1train.config import compose  # noqa: E402
from w1train.config.command_line import parse_command_line  # noqa: E402

_compose = compose._compose
_composed: dict[tuple, dict[str, Any]] = {}


def _compose_once(choices: Mapping[str, str], directories: Sequence[Path]) -> dict[str, Any]:
    """Hydra's part of a command line, a third of a tiny run's time: ranks find what their parent has composed from the same files."""
    files = [file for directory in directories for file in sorted(directory.rglob("*.yaml"))]
    key = (*choices.items(), *((str(file), file.stat().st_mtime_ns) for file in files))
    if key not in _composed:
        _composed[key] = _compose(choices, directories)
    return copy.deepcopy(_composed[key])


compose._compose = _compose_once

_IMPORTED_BY_RANKS = (
    "psutil",
    "torch.distributed.checkpoint",
    "w1train.conversion.initial_weights",
    "w1train.runtime.monitor",
    "w1train.runtime.watchdog",
    "w1train.training.loop",
)
_BY_THE_CLOCK = ("time/", "checkpoint/")
"""Begin the names of metrics that are measured."""
VOCAB_SIZE = 320
LENGTH = 32
BATCH = 8
NUM_STEPS = 12
CHECKPOINT_INTERVAL = 3
TIMEOUT = 120.0
"""Seconds; a run takes one or two on an idle machine."""

RECIPE = f"""\
# @package _global_
# A run of seconds.
name: tiny
model:
  vocab_size: {VOCAB_SIZE}
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  kv_channels: 12
  ffn_hidden_size: 48
  max_sequence_length: 64
  condition_size: 16
  timestep_frequency_size: 16
data:  # relative: the ranks start in the data's directory, so that a copy of a run goes on with a copy of its data
  train: train
  validation: validation
  tokenizer: tokenizer.json
  sequence_length: {LENGTH}
diffusion:
  num_strata: {BATCH}
schedule:
  stages:
    warmup: {{tokens: {2 * BATCH * LENGTH}, learning_rate: 1.0e-2, style: linear}}
    stable: {{tokens: {(NUM_STEPS - 2) * BATCH * LENGTH}, learning_rate: 1.0e-2}}
training: {{global_batch_size: {BATCH}, micro_batch_size: 4, precision: fp32}}
validation: {{interval: 4, num_samples: 8, timesteps: [0.25, 0.75]}}
sampling: {{interval: 6, num_tokens: 8, num_steps: 2}}
checkpoint: {{interval: {CHECKPOINT_INTERVAL}, keep: 2}}
logging: {{interval: 1, wandb: disabled}}
"""

Sabotage = Callable[[int], None]
"""Called with the rank in each rank before it trains: sets the trap that the test is about."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    statuses: list[int]
    """Exit status by rank; negative: the signal that killed it."""
    outputs: list[str]
    """What each rank wrote to stdout and stderr."""

    @property
    def output(self) -> str:
        """What rank 0 wrote."""
        return self.outputs[0]

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.statuses

    def require(self, status: int) -> Outcome:
        """Assert that every rank ended with this status."""
        assert self.statuses == [status] * len(self.outputs), f"{self.statuses}\n" + "\n".join(self.outputs)
        return self


@dataclass(frozen=True)
class TinyRun:
    """A directory with data and recipe in it, and a place for runs."""

    data: Path
    """Corpus, tokenizer, datasets and recipes; shared by all tests."""
    runs_dir: Path

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.runs_dir / "tiny"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def arguments(self, *overrides: str) -> list[str]:
        """The command line."""
        return ["--config-dir", str(self.data / "recipes"), "recipe=tiny", f"runs_dir={self.runs_dir}", *overrides]

    def train(self, *overrides: str, world_size: int = 1, sabotage: Sabotage | None = None, log: str = "rank") -> Outcome:
        """``w1train train`` on forked ranks."""
        self.runs_dir.mkdir(exist_ok=True)
        logs = [self.runs_dir / f"{log}-{rank}.log" for rank in range(world_size)]
        statuses = launch(world_size, partial(_rank, self.arguments(*overrides), self.data, logs, sabotage))
        return Outcome(statuses, [log.read_text() for log in logs])

    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what is measured by the clock: everything in it must survive a kill."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if not key.startswith(_BY_THE_CLOCK)} for line in lines]

    def train_records(self) -> list[dict[str, Any]]:
        return [record for record in self.metrics() if record["kind"] == "train"]

    def samples(self) -> str:
        """samples.jsonl, byte for byte."""
        return (self.path / "samples.jsonl").read_text()

    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    def steps_saved(self) -> list[int]:
        """Steps of the checkpoints under their final names."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*"))


def launch(world_size: int, main: Callable[[int], int]) -> list[int]:
    """Fork ranks that end with ``main(rank)`` as their status; negative: the signal that killed the rank.

    tests.distributed.run_distributed keeps all ranks until each has answered. Here a rank that ends is gone, as under torchrun,
    and the others have to notice; but when one is killed, so are the others.
    """
    prepare_to_train()
    port = free_port()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_enter_rank, args=(main, rank, world_size, port), daemon=True) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(rank.is_alive() for rank in ranks):
            assert time.monotonic() < deadline, f"hung: ranks {[number for number, rank in enumerate(ranks) if rank.is_alive()]}"
            wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1.0)
            if any(rank.exitcode == -signal.SIGKILL for rank in ranks):
                break
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [rank.exitcode or 0 for rank in ranks]


@cache
def prepare_to_train() -> None:
    """Do in this process what each forked rank of a run would: imports, the tables of Hydra's parser, the versions of what is installed."""
    for name in _IMPORTED_BY_RANKS:
        importlib.import_module(name)
    parse_command_line(["recipe=demo", "name=a_b", "runs_dir=/tmp/runs-0", "training.precision=bf16", "checkpoint.interval=1"])
    importlib.import_module("w1train.records.summary").code_versions()
    prepare_to_fork()


def _enter_rank(main: Callable[[int], int], rank: int, world_size: int, port: int) -> None:
    gc.freeze()  # the parent's garbage is the parent's: a finalizer run here would delete its temporary directories
    os.environ.update(rank_environment(rank, world_size, port))
    sys.exit(main(rank))


def _rank(arguments: list[str], data: Path, logs: list[Path], sabotage: Sabotage | None, rank: int) -> int:
    os.chdir(data)
    with output_to(logs[rank]):
        if sabotage is not None:
            sabotage(rank)
        try:
            return pretrain.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what this (forked) process writes to a file, and undo what pytest has done to logging and warnings."""
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - the process ends soon
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def make_data(directory: Path) -> None:
    """A corpus of about 100 kB, tokenizer, training and validation sets, and the recipe."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 7))) for _ in range(200)]
    documents = [" ".join(generator.choices(words, k=generator.randint(20, 120))) + "." for _ in range(250)]
    corpus, tokenizer = directory / "corpus.jsonl", directory / "tokenizer.json"
    corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    common = ["--input", str(corpus)]
    assert train_tokenizer.main([*common, "--output", str(tokenizer), "--vocab-size", str(VOCAB_SIZE)]) == 0
    outputs = ["--output", str(directory / "train"), "--validation-output", str(directory / "validation")]
    assert tokenize.main([*common, "--tokenizer", str(tokenizer), *outputs, "--validation-fraction", "0.2"]) == 0
    recipe = directory / "recipes/recipe/tiny.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(RECIPE)
