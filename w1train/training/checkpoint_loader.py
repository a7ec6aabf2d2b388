"""The state of a run from its checkpoints: at a start, and when the run goes back after a step that is not finite."""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import partial
from pathlib import Path

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.loading import load_checkpoint
from w1train.checkpoints.manifest import Progress, read_progress
from w1train.checkpoints.recovery import newest_good_step, set_aside_damaged
from w1train.checkpoints.verification import read_config
from w1train.config.errors import UserError, raise_if_any
from w1train.config.resume import check_resume
from w1train.config.schema import Config
from w1train.config.serialization import config_differences, config_to_yaml
from w1train.data.dataset import DatasetError
from w1train.engine.building import TrainedModel
from w1train.runtime.distributed import agreed, all_or_none, on_main_rank
from w1train.runtime.files import write_text
from w1train.runtime.run_directory import RunDirectory
from w1train.training.schedule_position import noise_fingerprint
from w1train.training.training_data import TrainingData

logger = logging.getLogger(__name__)


class CheckpointLoader:
    """The loader of one run's checkpoints. Every rank calls each of its methods."""

    def __init__(self, config: Config, run: RunDirectory, model: TrainedModel, data: TrainingData) -> None:
        self._config, self._run, self._model, self._data = config, run, model, data
        self._num_rewinds = 0

    def load(self, step: int | None) -> Progress:
        """Load model and optimizer from the checkpoint of ``step``, and return how far the run was. With None the run begins, and nothing
        is loaded.

        Raises:
            UserError: on every rank; the checkpoint is of another step than its name says.
            DatasetError: on every rank; the training data have changed since.
            UserError: on every rank; the counts that the noise depends on have changed since.
        """
        if step is None:
            return Progress()
        path = step_path(self._run.checkpoints, step)
        logger.info("resuming from %s", path)
        # It was verified when it was chosen.
        progress = load_checkpoint(path, self._model, verify=False)
        if progress.step != step:
            name = step_path(self._run.checkpoints, progress.step).name
            raise agreed(UserError(f"{path} is a checkpoint of step {progress.step}, by its manifest: rename it to {name}"))
        all_or_none(partial(self._require_dataset, progress, path))
        all_or_none(partial(self._require_noise, progress, path))
        return progress

    def go_back(self, progress: Progress, error: FloatingPointError) -> None:
        """Load the newest good checkpoint, in the hope that a fault of the machine was the cause of ``error``. ``progress`` is the run's
        own object, and is changed in place, because other objects read the run's step from it.

        Raises:
            FloatingPointError: ``error``, if there is no checkpoint, or the run may not go back any more.
        """
        health = self._config.health
        step = newest_good_step(self._run.checkpoints, hashes=self._config.checkpoint.verify)
        if health.on_nonfinite == "stop" or step is None or self._num_rewinds >= health.max_rewinds:
            raise error
        self._num_rewinds += 1
        times = f"{self._num_rewinds} of {health.max_rewinds} times"
        logger.warning("%s. Going back to the checkpoint of step %d (%s)", error, step, times)
        # A later damaged checkpoint would count as one of the newest checkpoints, and a good checkpoint would be removed in its place.
        on_main_rank(partial(set_aside_damaged, self._run.checkpoints, step))
        self._model.gather_parameters()
        loaded = self.load(step)
        for field in fields(Progress):
            setattr(progress, field.name, getattr(loaded, field.name))

    def _require_dataset(self, progress: Progress, path: Path) -> None:
        fingerprint = self._data.fingerprint(progress.samples)
        if progress.dataset != fingerprint:
            datasets = " or ".join(self._data.train)
            raise DatasetError(
                f"dataset {datasets} has changed since {path} was saved: the SHA-256 of its tokens is "
                f"{fingerprint}, it was {progress.dataset}. Bring the old data back, or start a run of another name"
            )

    def _require_noise(self, progress: Progress, path: Path) -> None:
        fingerprint = noise_fingerprint(self._config, progress.step)
        if progress.noise is not None and progress.noise != fingerprint:
            raise UserError(
                f"diffusion.token_counts: the counts have changed since {path} was saved: their SHA-256 is {fingerprint}, it was "
                f"{progress.noise}. Bring the old file back, or start a run of another name"
            )


def prepare_resume(config: Config, run: RunDirectory, step: int | None) -> None:
    """Compare the configuration with that of the checkpoint of ``step``, before anything is built, and write the new configuration. Only
    rank 0 calls this.

    Raises:
        ConfigurationError: a value differs that must not change between the checkpoint and the resumed run.
        CheckpointError: the checkpoint's configuration has changed since it was saved.
    """
    if step is not None:
        checkpoint = step_path(run.checkpoints, step)
        old = read_config(checkpoint)
        progress = read_progress(checkpoint)
        tokens = progress.samples * old.data.sequence_length
        raise_if_any(check_resume(old, config, tokens, data_are_hashed=progress.dataset is not None))
        for change in config_differences(old, config):
            logger.info("configuration changed on resume: %s: %s -> %s", change.key, change.old, change.new)
    write_text(run.config, config_to_yaml(config))
