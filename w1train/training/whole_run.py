"""A run from the claim of its directory to its end, inside of the process groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from w1train.checkpoints.manifest import describe_next_start
from w1train.config.schema import Config, HealthConfig
from w1train.conversion.initial_weights import open_initial_weights
from w1train.records.sink import Sink
from w1train.runtime.distributed import Ranks, on_main_rank
from w1train.runtime.monitor import monitored
from w1train.runtime.run_directory import RunDirectory
from w1train.runtime.status import StatusFile
from w1train.runtime.watchdog import put_stacks_aside
from w1train.training.loop import Trainer

Monitor = Callable[[Path, Ranks, HealthConfig, Callable[[], str]], AbstractContextManager[StatusFile]]


def train_run(
    config: Config,
    ranks: Ranks,
    directory: RunDirectory,
    max_steps: int | None = None,
    *,
    sinks: Sequence[type[Sink]] | None = None,
    monitor: Monitor = monitored,
) -> Trainer:
    """Train a run to its end, or until a signal stops it, and return its trainer. Every rank calls this. The caller releases the directory.

    Args:
        max_steps: the step of the run at which this start ends; None = the last step of the schedule.
        sinks: the places that records go to, if the configuration wants them; None = all sinks.
        monitor: what watches the run: w1train.runtime.monitor.monitored, or monitored_as_guest.

    Raises:
        The errors of ``Trainer``, and RunDirectoryError if the directory is in use.
    """
    on_main_rank(directory.claim)
    on_main_rank(partial(put_stacks_aside, directory.path))
    next_start = partial(describe_next_start, directory.checkpoints)
    with monitor(directory.path, ranks, config.health, next_start) as status:
        trainer = Trainer(config, ranks, directory, open_initial_weights, sinks)
        trainer.fit(max_steps)
        if trainer.is_paused:
            step = trainer.progress.step
            status.update("paused", message=f"ended at step {step:,} as --max-steps asked; the same command without --max-steps continues")
        else:
            status.update("stopped" if trainer.stopped else "finished")
    return trainer
