"""Everything a run shows and records: console, metrics.jsonl, samples.jsonl, events.jsonl, W&B, TensorBoard. Active on rank 0 only."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from w1train.checkpoints.manifest import Progress
from w1train.config.schema import Config
from w1train.config.serialization import flatten
from w1train.records.average_comparison import comparison_lines
from w1train.records.console import TrainingConsole
from w1train.records.summary import code_versions
from w1train.records.tensorboard import TensorBoardLogger, require_tensorboard
from w1train.records.wandb_log import WandbLogger
from w1train.runtime.clocks import SteadyTimeOfDay
from w1train.runtime.distributed import Ranks, agreed, all_or_none
from w1train.runtime.masking import mask
from w1train.runtime.record_files import MetricsLog, recorded_steps
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Watch:
    """A context manager; records are dropped on ranks other than 0."""

    def __init__(self, config: Config, ranks: Ranks, run: RunDirectory, progress: Progress, num_steps: int, num_tokens: int) -> None:
        self.config, self.progress = config, progress
        self.active, self.world_size = ranks.is_main, ranks.world_size
        if config.logging.tensorboard:
            all_or_none(require_tensorboard)
        self.console = TrainingConsole(
            total_tokens=num_tokens,
            total_steps=num_steps,
            start_step=progress.step,
            enabled=self.active,
            interval=config.logging.interval,
        )
        self.run = run
        self._time_of_day = SteadyTimeOfDay()

    def __enter__(self) -> Watch:
        """Opens, and cuts back to the run's step, what is recorded; before this nothing is touched."""
        with contextlib.ExitStack() as stack:
            if self.active:
                self._open_records(stack)
            stack.enter_context(self.console)
            self._stack = stack.pop_all()
        return self

    def _open_records(self, stack: contextlib.ExitStack) -> None:
        self.metrics = stack.enter_context(MetricsLog(self.run.metrics))
        self.samples = stack.enter_context(MetricsLog(self.run.samples))
        # Steps after the checkpoint will be done again, and recorded again. A run from the start has no step 0 to keep.
        kept = self.progress.step if self.progress.step > 0 else -1
        self.metrics.truncate_after(kept)
        self.samples.truncate_after(kept)
        self._tell_missing_records()
        self.events = stack.enter_context(MetricsLog(self.run.events))
        self._tell_a_clock_that_was_set_back()
        versions = code_versions()
        # Never cut back: what happened, happened.
        what = "resume" if self.progress.step > 0 else "start"
        self.event(what, host=socket.gethostname(), world_size=self.world_size, git_commit=versions["git_commit"])
        self._open_wandb(stack, versions)
        self.tensorboard: TensorBoardLogger | None = None
        if self.config.logging.tensorboard:
            self._open_tensorboard(stack, kept + 1)

    def _tell_missing_records(self) -> None:
        """A resume writes the steps after its checkpoint, not those before it."""
        recorded = recorded_steps(self.run.metrics, kind="train")
        missing = [step for step in range(1, self.progress.step + 1) if step not in recorded]
        if missing:
            logger.warning(
                "%s has no records of %d of the %d steps before this start (step %d to %d): they are lost, or another run's",
                self.run.metrics,
                len(missing),
                self.progress.step,
                missing[0],
                missing[-1],
            )

    def _tell_a_clock_that_was_set_back(self) -> None:
        """Times within a start follow each other, whatever is done to the clock; those of two starts may not."""
        newest = (self.events.newest() or {}).get("time")
        # Somebody else may have written the file.
        behind = newest - self._time_of_day() if isinstance(newest, int | float) and math.isfinite(newest) else 0.0
        if behind > 0:
            logger.warning("the clock is %.0f s behind the newest event of %s: it was set back since then", behind, self.run.events)

    def _open_wandb(self, stack: contextlib.ExitStack, versions: dict[str, Any]) -> None:
        self.wandb = WandbLogger(
            self.run.path,
            mode=self.config.logging.wandb,
            project=self.config.logging.wandb_project,
            name=self.config.name,
            config={**flatten(self.config), **{f"versions.{name}": value for name, value in versions.items()}},
            validation_timesteps=self.config.validation.timesteps,
            stages=tuple(self.config.schedule.stages),
        )
        stack.push(self._close_wandb)

    def _open_tensorboard(self, stack: contextlib.ExitStack, first_step: int) -> None:
        self.tensorboard = TensorBoardLogger(
            self.run.path,
            first_step=first_step,
            validation_timesteps=self.config.validation.timesteps,
            stages=tuple(self.config.schedule.stages),
        )
        stack.callback(self.tensorboard.close)

    def _close_wandb(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.wandb.close(exit_code=0 if error is None else 1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, traceback)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """A training step, a validation or an average's comparison, at the run's present step."""
        if not self.active:
            return
        tokens = self.progress.samples * self.config.data.sequence_length
        consumed = {"samples": self.progress.samples, "tokens": tokens} if kind == "train" else {"tokens": tokens}
        record = {"kind": kind, "step": self.progress.step, **consumed, **values}
        self.metrics.append(record)
        self.wandb.log(record)
        if self.tensorboard is not None:
            self.tensorboard.log(record)
        if kind == "train":
            self.console.update(record)
        elif kind == "validation":
            self.console.print_validation(record)
        else:
            for line in comparison_lines(record):
                self.console.print_line(line)

    def go_back(self) -> None:
        """Forget what is recorded of later steps than the run's present one: it is done again."""
        if self.active:
            self.metrics.truncate_after(self.progress.step)
            self.samples.truncate_after(self.progress.step)
            if self.tensorboard is not None:
                self.tensorboard.go_back(self.progress.step + 1)
            self.event("rewind")

    def event(self, name: str, **values: Any) -> None:
        """Something that happened, at the run's present step unless ``values`` has another, and is no measurement (a start, a checkpoint):
        a line of events.jsonl."""
        if self.active:
            shown = {key: mask(value) if isinstance(value, str) else value for key, value in values.items()}
            self.events.append({"step": self.progress.step, "event": name, "time": self._time_of_day(), **shown})

    def sync(self) -> None:
        """Get the records to the disk: before a checkpoint says that its steps are done."""
        if self.active:
            self.metrics.sync()
            self.samples.sync()
            if self.tensorboard is not None:
                self.tensorboard.sync()

    def record_samples(self, samples: Sequence[tuple[str, str]]) -> None:
        """(prompt, text) pairs."""
        if not self.active:
            return
        tokens = self.progress.samples * self.config.data.sequence_length
        records = [{"step": self.progress.step, "tokens": tokens, "prompt": prompt, "text": text} for prompt, text in samples]
        for record in records:
            self.samples.append(record)
            self.console.print_sample(record)
        self.wandb.log_samples(records)
        if self.tensorboard is not None:
            self.tensorboard.log_samples(records)


def require_finite(step: int, values: dict[str, float]) -> None:
    """Stop a run one of whose values, the same on all ranks, is no number: the parameters are lost, the last checkpoint is not.

    Raises:
        FloatingPointError: on every rank.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            error = FloatingPointError(
                f"{name} is {value} at step {step}; training stops before this reaches a checkpoint. "
                "The same command goes on from the last one, if there is one. A lower learning rate or more clipping takes a run of "
                "another name, which may start from the weights of this one (training.initial_weights)"
            )
            raise agreed(error)
