"""Initial weights of a new run from a Hugging Face directory or from another run (``training.initial_weights``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from w1train.checkpoints.stored_size import require_stored
from w1train.checkpoints.verification import read_config as read_checkpoint_config
from w1train.checkpoints.verification import verify_checkpoint
from w1train.config.errors import UserError, raise_if_any
from w1train.config.schema import Config
from w1train.conversion.families import family_of, model_from_config, read_config
from w1train.conversion.filling import RankSlices, StoredModel, fill, require_fit
from w1train.conversion.merging import MergedSource
from w1train.conversion.model_fit import adapter_problems, find_checkpoint
from w1train.conversion.sources import CheckpointDirectory, SafetensorsDirectory
from w1train.conversion.tensors import checkpoint_parameters, hugging_face_parameters
from w1train.engine.building import LoadWeights
from w1train.model.flops import NO_ADAPTERS
from w1train.model.initialization import Slice
from w1train.runtime.distributed import all_or_none

logger = logging.getLogger(__name__)


class InitialWeights:
    """Stored weights that are opened and compared with the configuration, but not read yet."""

    def __init__(self, config: Config) -> None:
        """Open the weights on every rank, before the model is built. ``training.initial_weights`` must be set.

        Raises:
            UserError: on every rank: the path holds no weights, or they do not fit ``config.model``.
            CheckpointError: on every rank: the path is a damaged checkpoint.
        """
        assert config.training.initial_weights is not None
        self.config = config
        path = Path(config.training.initial_weights)
        checkpoint = all_or_none(partial(find_checkpoint, path))
        if checkpoint is not None:
            verify_checkpoint(checkpoint, rank=dist.get_rank(), num_ranks=dist.get_world_size())
        self.stored = all_or_none(partial(_open, config, path, checkpoint))

    def load(self, stages: Sequence[torch.nn.Module]) -> None:
        """Write the parameters of this rank's stages. Every rank calls this before the optimizer copies parameters to fp32 masters."""
        all_or_none(partial(self._fill, stages))
        self._report()

    def _fill(self, stages: Sequence[torch.nn.Module]) -> None:
        try:
            fill(self.stored, stages, self.config.model, rank_slices(self.config))
        except OSError as error:
            raise UserError(f"{self.stored.origin} cannot be read: {error}") from error

    def _report(self) -> None:
        model, stored = self.config.model, self.stored.model
        logger.info("initial weights from %s", self.stored.origin)
        if isinstance(self.stored.source, MergedSource) and self.stored.source.is_merged:
            logger.info("the adapters of %s are added to its weights", self.stored.origin)
        if model.conditioning == "adaln" and stored.conditioning == "none":
            logger.info("adaLN is new and starts as the identity, so that the model computes the function of %s", self.stored.origin)
        if model.vocab_size > stored.vocab_size:
            logger.info("vocabulary rows %d to %d are new and are made from the other rows", stored.vocab_size, model.vocab_size - 1)
        mask = self.config.diffusion.mask_token_id
        if mask < stored.vocab_size:
            logger.info("the mask token %d keeps the row that it has in %s", mask, self.stored.origin)


def rank_slices(config: Config) -> RankSlices:
    """Return the parts of parameters that this rank has."""
    tensor = Slice(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size())
    experts = Slice(parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size())
    first = parallel_state.get_expert_model_parallel_rank() * config.model.experts.num_experts // config.parallel.expert
    return RankSlices(tensor, experts, first)


def open_initial_weights(config: Config) -> LoadWeights:
    """Open the weights and compare them with the configuration (:class:`InitialWeights`), and return the function that loads them."""
    return InitialWeights(config).load


def _open(config: Config, path: Path, checkpoint: Path | None) -> StoredModel:
    if checkpoint is not None:
        run = read_checkpoint_config(checkpoint)
        model, source = run.model, CheckpointDirectory(checkpoint)
        require_stored(checkpoint, model)
        raise_if_any(adapter_problems(config.model, config.adapters, run.adapters, str(checkpoint)))
        keeps_adapters = config.adapters.rank > 0 and run.adapters.rank > 0
        parameters = checkpoint_parameters(config.model, config.adapters if keeps_adapters else NO_ADAPTERS)
        whole = source if keeps_adapters else MergedSource(source, run.adapters)
        stored = StoredModel(str(checkpoint), model, whole, tuple(parameters))
    else:
        described = read_config(path)
        model, names = model_from_config(described, str(path)), family_of(described, str(path)).names
        stored = StoredModel(str(path), model, SafetensorsDirectory(path), tuple(hugging_face_parameters(config.model, names)))
    require_fit(stored, config.model)
    return stored
