"""One variant of benchmarks.step, in a process of its own: the real Trainer over a few steps, then one step under the profiler."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.attention.sides import UnfusedBackend
from benchmarks.step.profile import Breakdown, profile_step
from w1train.attention.backends.choice import BACKENDS, choose_backend
from w1train.config.schema import Config
from w1train.conversion.initial_weights import open_initial_weights
from w1train.runtime.distributed import distributed
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.training import inputs
from w1train.training.loop import Trainer


def measure_run(config: Config, *, unfused: bool, num_warmup: int, num_steps: int) -> dict[str, Any]:
    """Train from random weights, and say what it took.

    Args:
        unfused: unfused bf16 attention takes the place of the fp32 reference, which ``config`` asks for.

    Returns:
        Numbers as JSON holds them: medians over the measured steps, peak memory, and the profiled step's breakdown.
    """
    run = RunDirectory(Path(config.runs_dir) / config.name)
    # Not restored: the process ends with the run.
    if unfused:
        BACKENDS["reference"] = UnfusedBackend
        choose_backend.cache_clear()
    with distributed(config.parallel) as ranks, _backends_chosen() as backends:
        run.claim()
        trainer = Trainer(config, ranks, run, open_initial_weights)
        with trainer.watch, trainer.data.loader:
            batches = trainer.noisy_batches()
            for _ in range(num_warmup + num_steps):
                trainer.train_step(batches)
            # Its record would count the profiler's time.
            with mock.patch.object(trainer, "record_step"):
                breakdown = profile_step(lambda: trainer.train_step(batches), ranks.device)
        run.release()
        capacity = torch.cuda.get_device_properties(ranks.device).total_memory / 2**30 if ranks.device.type == "cuda" else None
    records = read_metrics(run.metrics, kind="train")[num_warmup : num_warmup + num_steps]
    return {**_medians(records), "backend": ", ".join(sorted(backends)), "capacity_gib": capacity, **_as_json(breakdown)}


@contextlib.contextmanager
def _backends_chosen() -> Iterator[set[str]]:
    """Yield the set of names of the backends that are used in the block."""
    found: set[str] = set()
    choose = inputs.choose_backend

    def noted(*arguments: Any) -> Any:
        backend = choose(*arguments)
        found.add("unfused" if isinstance(backend, UnfusedBackend) else backend.name)
        return backend

    with mock.patch.object(inputs, "choose_backend", noted):
        yield found


def _medians(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the medians of records of metrics.jsonl."""
    names = {
        "seconds": "time/step_seconds",
        "tokens_per_second": "time/tokens_per_second",
        "tflops": "time/tflops_per_second",
        "mfu": "time/mfu",
        "data_wait": "time/data_wait_seconds",
    }
    found: dict[str, float | None] = {}
    for name, key in names.items():
        values = [record[key] for record in records if record[key] is not None]
        found[name] = statistics.median(values) if values else None
    return {**found, "memory_gib": records[-1]["time/memory_gib"], "loss": records[-1]["loss"]}


def _as_json(breakdown: Breakdown) -> dict[str, Any]:
    return {"groups": breakdown.seconds, "busy": breakdown.busy, "largest": breakdown.largest}
