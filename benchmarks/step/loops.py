"""The two loops that ``benchmarks.step.overhead`` compares, and the clock around their parts.

Shapes: m = positions with logits.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from w1train.config.schedule import learning_rate
from w1train.config.schema import Config
from w1train.conversion.initial_weights import open_initial_weights
from w1train.data.loader import BatchLoader
from w1train.diffusion.corruption import corrupt
from w1train.engine.building import build_stage
from w1train.model.transformer import ModelInputs
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.objective import objective_of
from w1train.runtime.distributed import distributed
from w1train.runtime.run_directory import RunDirectory
from w1train.training import forward, loop
from w1train.training.loop import Trainer


@dataclass(slots=True)
class BareBatch:
    """A micro-batch of the bare loop, for which nothing is left to prepare."""

    inputs: ModelInputs
    targets: Tensor
    """int64 [m]: the clean tokens at the positions with logits."""
    weights: Tensor
    """float32 [m]: the objective's weight, divided by the denominator of the global batch."""


@dataclass(slots=True, frozen=True)
class Seconds:
    """A period of time, by two clocks."""

    wall: float = 0.0
    cpu: float = 0.0
    """Processor time of all threads of this process, which a busy machine disturbs less."""

    @classmethod
    def now(cls) -> Seconds:
        """Return the seconds since a moment in the past. Only differences between them mean something."""
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


class PartClock:
    """A clock for the parts of one step, which do not overlap."""

    def __init__(self) -> None:
        self.parts: defaultdict[str, Seconds] = defaultdict(Seconds)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time inside to ``part``."""
        start = Seconds.now()
        yield
        self.parts[part] += Seconds.now() - start

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with the time of its calls added to ``part``."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.measure(part):
                return function(*args, **kwargs)

        return call


@dataclass(slots=True)
class Measurements:
    """The measurements of one of the two loops, with an entry for each step."""

    steps: list[Seconds] = field(default_factory=list)
    parts: list[dict[str, Seconds]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, step: Callable[[], float], clock: PartClock) -> None:
        """Run and time one step, which returns its loss."""
        clock.parts.clear()
        start = Seconds.now()
        loss = step()
        spent = Seconds.now() - start
        self.steps.append(spent)
        self.parts.append({**clock.parts, "rest": spent - sum(clock.parts.values(), start=Seconds())})
        self.losses.append(loss)


class FrameworkLoop:
    """``Trainer.train_step``, with a clock around its parts."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.clock = trainer, PartClock()
        self._batches = trainer.noisy_batches()
        self._loss = float("nan")

    def step(self) -> float:
        """Train one optimizer step, and return its loss as in metrics.jsonl."""
        self.trainer.train_step(self._batches)
        return self._loss

    @contextlib.contextmanager
    def instrumented(self) -> Iterator[None]:
        """Time the parts of steps in the block: some twenty calls in each step, which costs about a microsecond each."""
        model = self.trainer.model
        targets: list[tuple[str, Any, str]] = [
            ("corruption", loop, "corrupt"),
            ("plan", forward, "rank_inputs"),
            ("forward", model.stages[0], "forward"),
            ("loss", forward, "_loss"),
            ("backward", schedules, "backward_step"),
            ("gradients", model.chunks[0], "zero_grad_buffer"),
            ("gradients", model.optimizer, "zero_grad"),
            ("gradients", model.config, "finalize_model_grads_func"),
            ("optimizer", loop, "prepare_gradients"),
            ("optimizer", model.optimizer, "step"),
            ("metrics", forward, "_sum_over_ranks"),
            ("metrics", self.trainer, "record_step"),
        ]
        with contextlib.ExitStack() as stack:
            for part, owner, name in targets:
                stack.enter_context(mock.patch.object(owner, name, self.clock.timed(part, getattr(owner, name))))
            stack.enter_context(
                mock.patch.object(self.trainer.timer, "waiting_for_data", self._waiting(self.trainer.timer.waiting_for_data))
            )
            stack.enter_context(mock.patch.object(self.trainer.watch, "record", self._recorded(self.trainer.watch.record)))
            yield

    def _waiting(self, waiting_for_data: Callable[[], Any]) -> Callable[[], Any]:
        @contextlib.contextmanager
        def waiting() -> Iterator[None]:
            with self.clock.measure("data"), waiting_for_data():
                yield

        return waiting

    def _recorded(self, record: Callable[[str, dict[str, Any]], None]) -> Callable[[str, dict[str, Any]], None]:
        def keep_loss(kind: str, values: dict[str, Any]) -> None:
            self._loss = values["loss"]
            record(kind, values)

        return keep_loss


class BareLoop:
    """The same model trained by hand."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.config, self.clock = config, PartClock()
        self.model = build_stage(config, trainer.model.config)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            fused=True,
        )
        self._loader = BatchLoader(trainer.data.samples, micro_batch_size=config.training.micro_batch_size, num_workers=0)

    def prepare(self, step: int) -> list[BareBatch]:
        """Set the learning rate of a step, counted from 0, and return its micro-batches. This is not timed."""
        training, schedule = self.config.training, self.config.schedule
        rate = learning_rate(schedule, (step + 1) * training.global_batch_size * self.config.data.sequence_length)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        source = self._loader.micro_batches(step * training.global_batch_size)
        num_micro_batches = training.global_batch_size // training.micro_batch_size
        noisy = [corrupt(next(source), self.config.diffusion, training.seed) for _ in range(num_micro_batches)]
        prepared = [forward.rank_inputs(each, self.config) for each in noisy]
        total = sum(self._denominator(inputs.rows) for inputs in prepared)
        return [BareBatch(inputs.model, inputs.targets, inputs.rows.weights / total) for inputs in prepared]

    def step(self, batches: Sequence[BareBatch]) -> float:
        """Train one optimizer step, and return its loss."""
        measure = self.clock.measure
        total = torch.zeros(())
        for batch in batches:
            with measure("forward"):
                logits = self.model(batch.inputs)
            with measure("loss"):
                loss = (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
            with measure("backward"):
                loss.backward()
            total += loss.detach()
        with measure("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
            self.optimizer.step()
        with measure("gradients"):
            self.optimizer.zero_grad()
        return float(total)

    def _denominator(self, rows: LossRows) -> float:
        objective = objective_of(self.config.diffusion, self.config.logging.num_t_bins)
        _, sums = objective.loss({name: torch.zeros(len(rows.targets)) for name in objective.row_terms(rows)}, rows)
        return float(sums[objective.normalizer])


def compare(config: Config, *, num_steps: int, num_warmup: int) -> tuple[Measurements, Measurements]:
    """Measure ``num_steps`` steps of the framework and of the bare loop, after ``num_warmup`` steps of each that are not counted."""
    run = RunDirectory(Path(config.runs_dir) / config.name)
    with distributed(config.parallel) as ranks, open(Path(config.runs_dir) / "console.log", "w") as console:
        run.claim()
        with contextlib.redirect_stdout(console):
            trainer = Trainer(config, ranks, run, open_initial_weights)
            framework, bare = FrameworkLoop(trainer), BareLoop(trainer)
            with trainer.watch, trainer.data.loader, framework.instrumented():
                _alternate(framework, bare, range(num_warmup))
                measured = _alternate(framework, bare, range(num_warmup, num_warmup + num_steps))
        run.release()
    return measured


def _alternate(framework: FrameworkLoop, bare: BareLoop, steps: range) -> tuple[Measurements, Measurements]:
    measured = Measurements(), Measurements()
    for step in steps:
        bare_step = partial(bare.step, bare.prepare(step))
        turns = [partial(measured[0].add, framework.step, framework.clock), partial(measured[1].add, bare_step, bare.clock)]
        for turn in turns if step % 2 == 0 else reversed(turns):
            turn()
    return measured
