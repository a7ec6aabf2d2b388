"""Validation of a run's checkpoints on this process, with the samples, noise and timesteps of validation during training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from w1train.checkpoints.loading import load_model_weights
from w1train.config.errors import UserError
from w1train.config.schema import DataConfig
from w1train.data.remote import require_local, require_password
from w1train.inference.predictor import InferenceModel
from w1train.runtime.distributed import current_ranks
from w1train.training.training_data import ValidationData
from w1train.training.validation import validate


def open_validation(model: InferenceModel, prefix: str | None = None) -> ValidationData:
    """Open the run's validation set, or the set under ``prefix``.

    Raises:
        UserError: the run has no validation set; the set is damaged or does not fit the model; it is in object storage, and only the
            run's configuration names it.
    """
    require_own(model.config.data, prefix)
    data = model.config.data if prefix is None else replace(model.config.data, validation=prefix, validation_sets={})
    return ValidationData(replace(model.config, data=data), current_ranks(model.device))


def require_own(data: DataConfig, prefix: str | None) -> None:
    """Raise UserError unless there is a local validation set, or the user named a validation set in object storage as ``prefix``."""
    if prefix is not None:
        require_password(prefix)
        return
    if data.validation is None:
        raise UserError("the run has no data.validation; give a dataset with --validation PREFIX")
    for from_run in (data.validation, *data.validation_sets.values()):
        if from_run is not None:
            require_local(from_run)


def validation_of(model: InferenceModel, prefix: str | None = None) -> dict[str, Any]:
    """Return the record of a validation, as :func:`validate_checkpoint` does, and the ``timesteps`` of ``loss_by_t``.

    Args:
        prefix: the validation set; None = the run's.
    """
    record = validate_checkpoint(model, open_validation(model, prefix))
    return {**record, "timesteps": model.config.validation.timesteps}


def validate_checkpoint(model: InferenceModel, data: ValidationData, path: Path | None = None) -> dict[str, Any]:
    """Return elbo (nats per token), elbo_bits_per_byte, masked_cross_entropy and loss_by_t, as validation during training does.

    Args:
        path: a checkpoint whose weights are loaded into the model first; None = the model keeps its weights.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if path is not None:
        load_model_weights(path, list(model.predict.chunks))
    return validate(model.config, model.predict, data)
