"""Models beside the model that is trained: a frozen reference, which has weights and nothing else.

A companion is built in the layout of the run, and reads its weights as a new run reads its initial weights. It has no gradients, no
optimizer and no data-parallel wrapper. Its weights are not written to the checkpoints of the run. A checkpoint remembers where they came
from and their hash, and a run that resumes reads them again and compares the hash.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from w1train.checkpoints.manifest import Progress
from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.config.schema_adapters import LORA_A, LORA_B
from w1train.config.stages import has_preferences
from w1train.conversion.model_fit import find_checkpoint
from w1train.engine.building import LoadWeights, TrainedModel, build_stage
from w1train.engine.weights_hash import weights_hash
from w1train.model.adapters import adapters_off
from w1train.model.megatron_config import transformer_config
from w1train.runtime.distributed import agreed, all_or_none

logger = logging.getLogger(__name__)


class Companion(Protocol):
    """A model that is not trained, and gives numbers for the loss of the model that is trained."""

    kept: dict[Hashable, Tensor]
    """Numbers that were computed from data that are always the same, such as those of validation."""

    sha256: str
    """The hash of the weights, over all ranks."""
    origin: str
    """Name of the weights in messages."""

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """Return the chunks of the companion for the passes inside of the ``with`` statement."""

    def current_hash(self) -> str:
        """Compute the hash of the weights as they are now. Every rank calls this."""


class FrozenModel:
    """A companion with weights of its own, in the precision in which the run computes."""

    def __init__(self, config: Config, load: LoadWeights, origin: str) -> None:
        """Build this rank's stages and load their weights. Every rank calls this. ``origin`` names the weights in messages."""
        megatron = transformer_config(config.model, config.parallel, config.training.precision, config.kernels, config.training.fp8)
        megatron.deterministic_mode = config.training.deterministic
        self.chunks = [build_stage(config, megatron, vp_stage) for vp_stage in range(config.parallel.virtual_pipeline)]
        load(self.chunks)
        for chunk in self.chunks:
            chunk.requires_grad_(requires_grad=False).eval()
        self.origin, self.sha256 = origin, weights_hash(self.chunks)
        self.kept: dict[Hashable, Tensor] = {}

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """Compute Companion.active."""
        return nullcontext(self.chunks)

    def current_hash(self) -> str:
        """Compute Companion.current_hash."""
        return weights_hash(self.chunks)


class WithoutAdapters:
    """The model that is trained with its adapters off, as a companion: all its other weights are frozen."""

    def __init__(self, model: TrainedModel) -> None:
        """Compute the hash of the frozen weights. Every rank calls this."""
        self._model = model
        self.origin, self.sha256 = "the model without its adapters", self.current_hash()
        self.kept: dict[Hashable, Tensor] = {}

    @contextmanager
    def active(self) -> Iterator[Sequence[torch.nn.Module]]:
        """Compute Companion.active. The chunks are in the mode of evaluation for as long as the context lasts."""
        chunks = self._model.chunks
        was_training = chunks[0].training
        for chunk in chunks:
            chunk.eval()
        try:
            with adapters_off(self._model.stages):
                yield chunks
        finally:
            for chunk in chunks:
                chunk.train(was_training)

    def current_hash(self) -> str:
        """Compute Companion.current_hash, of the weights that are not adapters."""
        self._model.gather_parameters()
        return weights_hash(self._model.stages, leave_out=(LORA_A, LORA_B))


def require_unchanged(companion: Companion) -> None:
    """Compare the weights of a companion with those that it began with. Every rank calls this.

    Raises:
        RuntimeError: on every rank; something has written to the frozen weights.
    """
    if companion.current_hash() != companion.sha256:
        raise agreed(RuntimeError(f"the weights of the reference, {companion.origin}, have changed in memory since the run started"))


def build_reference(
    config: Config, model: TrainedModel, open_weights: Callable[[Config], LoadWeights], progress: Progress
) -> Companion | None:
    """Build the reference of a run with preferences, and write its origin and hash into the run's progress; None for other runs. Every
    rank calls this.

    Raises:
        UserError, CheckpointError: on every rank; the weights cannot be read, or are not those that the run began with.
    """
    if not has_preferences(config):
        return None
    reference = WithoutAdapters(model) if config.reference.mode == "adapters_off" else _frozen_model(config, open_weights, progress)
    began_with = progress.reference.get("sha256", reference.sha256)
    if began_with != reference.sha256:
        raise agreed(
            UserError(
                f"{reference_key(config)}: the weights of {reference.origin} have changed since the run began: their SHA-256 is "
                f"{reference.sha256}, it was {began_with}, of {progress.reference['weights']}. Bring the old weights back, or start a run "
                "of another name"
            )
        )
    logger.info("the reference has the weights of %s, whose SHA-256 is %s", reference.origin, reference.sha256)
    progress.reference = {"weights": reference.origin, "sha256": reference.sha256}
    return reference


def _frozen_model(config: Config, open_weights: Callable[[Config], LoadWeights], progress: Progress) -> FrozenModel:
    weights = str(all_or_none(partial(_weights_of, config, progress)))
    training = dataclasses.replace(config.training, initial_weights=weights)
    return FrozenModel(config, open_weights(dataclasses.replace(config, training=training)), weights)


def reference_key(config: Config) -> str:
    """Return the key that says where the reference's weights are."""
    return "training.initial_weights" if config.reference.weights is None else "reference.weights"


def _weights_of(config: Config, progress: Progress) -> Path:
    """Return the directory of the reference's weights: a checkpoint for the path of a run, which may have newer checkpoints when this run
    resumes."""
    path = config.training.initial_weights if config.reference.weights is None else config.reference.weights
    assert path is not None, "the configuration was not validated"
    before = progress.reference.get("weights")
    if before is not None and Path(before).is_relative_to(path) and Path(before).is_dir():
        return Path(before)
    return find_checkpoint(Path(path)) or Path(path)
