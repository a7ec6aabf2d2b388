"""Models beside the model that is trained: a frozen reference, which has weights and nothing else.

A companion is built in the layout of the run, reads its weights as a new run reads its initial weights, and has no gradients, no optimizer
and no data-parallel wrapper. Its weights are not written to the checkpoints of the run. A checkpoint remembers where they came from and their
hash, and a run that resumes reads them again and compares the hash.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from w1train.checkpoints.manifest import Progress
from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.config.stages import has_preferences
from w1train.conversion.model_fit import find_checkpoint
from w1train.engine.building import LoadWeights, build_stage
from w1train.engine.weights_hash import weights_hash
from w1train.model.megatron_config import transformer_config
from w1train.runtime.distributed import agreed, all_or_none

logger = logging.getLogger(__name__)


class Companion(Protocol):
    """A model that is not trained, and gives numbers for the loss of the model that is trained."""

    kept: dict[Hashable, Tensor]
    """Numbers that were computed from data that are always the same, such as those of validation."""

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """Return the chunks of the companion for the passes inside of the ``with`` statement."""


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

    def require_unchanged(self) -> None:
        """Compare the weights with those that were loaded. Every rank calls this.

        Raises:
            RuntimeError: on every rank; something has written to the frozen weights.
        """
        if weights_hash(self.chunks) != self.sha256:
            raise agreed(RuntimeError(f"the weights of the reference {self.origin} have changed in memory since they were loaded"))


def build_reference(config: Config, open_weights: Callable[[Config], LoadWeights], progress: Progress) -> FrozenModel | None:
    """Build the reference of a run with preferences, and write its origin and hash into the run's progress; None for other runs. Every rank
    calls this.

    Raises:
        UserError, CheckpointError: on every rank; the weights cannot be read, or are not those that the run began with.
    """
    if not has_preferences(config):
        return None
    weights = all_or_none(partial(_weights_of, config, progress))
    training = dataclasses.replace(config.training, initial_weights=str(weights))
    reference = FrozenModel(config, open_weights(dataclasses.replace(config, training=training)), str(weights))
    began_with = progress.reference.get("sha256", reference.sha256)
    if began_with != reference.sha256:
        raise agreed(
            UserError(
                f"{reference_key(config)}: the weights of {weights} have changed since the run began: their SHA-256 is {reference.sha256}, it "
                f"was {began_with}, of {progress.reference['weights']}. Bring the old weights back, or start a run of another name"
            )
        )
    logger.info("the reference has the weights of %s, whose SHA-256 is %s", weights, reference.sha256)
    progress.reference = {"weights": str(weights), "sha256": reference.sha256}
    return reference


def reference_key(config: Config) -> str:
    """Return the key that says where the reference's weights are."""
    return "training.initial_weights" if config.reference.weights is None else "reference.weights"


def _weights_of(config: Config, progress: Progress) -> Path:
    """Return the directory of the reference's weights: a checkpoint for the path of a run, which may have newer checkpoints when this run
    resumes."""
    path = config.training.initial_weights if config.reference.weights is None else config.reference.weights
    assert path is not None, "the configuration was not validated"
    before = Path(progress.reference.get("weights", path))
    if before.is_relative_to(path) and before.is_dir():
        return before
    return find_checkpoint(Path(path)) or Path(path)
