"""Saves for tests: what training does with ``checkpoint.asynchronous=false``, in one call."""

from __future__ import annotations

from pathlib import Path

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import Progress
from w1train.checkpoints.saver import CheckpointSaver
from w1train.config.schema_operation import CheckpointConfig
from w1train.engine.building import TrainedModel

_MANY = 1000


def save_now(directory: Path, model: TrainedModel, progress: Progress, config_yaml: str = "") -> Path:
    """Save, wait for it, and return the checkpoint's path; no other checkpoint is removed. Every rank calls this."""
    saver = CheckpointSaver(directory, model, CheckpointConfig(keep=_MANY, asynchronous=False, on_error="stop"), config_yaml)
    saver.save(progress)
    return step_path(directory, progress.step)
