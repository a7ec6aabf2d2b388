"""The inputs of this rank's model, made of a corrupted batch: streams, visibility, and the rank's part of the positions.

Shapes: b = samples, l = sequence_length, n = positions of this rank (l without context parallelism), p = number of streams
(1: masked diffusion; 2: block diffusion's [x_t ; x_0]), g = segments.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from megatron.core import parallel_state
from torch import Tensor

from w1train.attention.attention_plan import AttentionPlan, plan_attention
from w1train.attention.backends.choice import choose_backend
from w1train.attention.context_parallel import (
    KeyExchange,
    Ownership,
    Travel,
    blocks_stay_home,
    deal_positions,
    key_exchange,
    local_visibility,
)
from w1train.attention.visibility import (
    Visibility,
    block_diffusion_visibility,
    causal_visibility,
    document_visibility,
    scattered_visibility,
)
from w1train.config.rules.attention_limits import AttentionCase, attention_case
from w1train.config.schema import Config
from w1train.config.stages import at_stage
from w1train.data.documents import block_bounds
from w1train.diffusion.corruption import NoisyBatch
from w1train.diffusion.embedding_noise import EmbeddingNoise
from w1train.diffusion.processes import noise_process
from w1train.model.experts.block_pools import RoutingBlocks
from w1train.model.experts.routed_tokens import first_counted_kind, token_kinds
from w1train.model.experts.router_losses import RouterLosses
from w1train.model.transformer import ModelInputs
from w1train.objectives.description import num_streams, samples_are_segments
from w1train.objectives.loss_rows import LossRows, loss_rows
from w1train.objectives.objective import objective_at

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RankInputs:
    """One micro-batch on one rank."""

    model: ModelInputs
    rows: LossRows
    """The rows at ``model.logit_positions``, with what the loss knows about them."""
    balance: float
    """The largest number of visible pairs of a context-parallel rank, divided by the mean over ranks; 1 without context parallelism."""

    @property
    def targets(self) -> Tensor:
        """int64 [m], the tokens that the outputs at ``model.logit_positions`` should predict: first those of the noisy stream, then the
        next tokens of the clean stream."""
        return self.rows.targets


def rank_inputs(noisy: NoisyBatch, config: Config) -> RankInputs:
    """Return the model's inputs on this rank. All ranks of a model replica pass the same batch."""
    streams = num_streams(config)
    weights, losses = objective_at(config).weights(noisy), _router_losses(noisy, config, streams)
    visibility = sequence_visibility(noisy, config, streams)
    backend = choose_backend(config.attention.backend, _attention_case(config), visibility.endpoints.device)
    if config.parallel.context == 1:
        plan = plan_attention(visibility, backend)
        model = _assemble(noisy, config, streams, plan, losses)
        model.routing_blocks = _routing_blocks(noisy, config, streams)
        return RankInputs(model, _loss_rows(noisy, weights), 1.0)
    travel = _travel(noisy, config, streams)
    ownership = _ownership(visibility, config, streams, travel)
    rank, group = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group()
    local = local_visibility(visibility, ownership, rank, streams, travel)
    exchange: KeyExchange = key_exchange(ownership, streams, travel, group)
    plan = plan_attention(local, backend, exchange=exchange)
    positions = ownership.positions[:, rank]
    own = noisy.at(positions)
    model = _assemble(own, config, streams, plan, losses)
    model.routing_blocks = _routing_blocks(noisy, config, streams, positions)
    return RankInputs(model, _loss_rows(own, weights.gather(1, positions)), ownership.balance)


def _loss_rows(noisy: NoisyBatch, weights: Tensor) -> LossRows:
    """Return the rows of this rank, which share learned rates of noise with other ranks."""
    rows = loss_rows(noisy, weights)
    if (noise := rows.learned_noise) is not None:
        noise.counts_once = parallel_state.get_tensor_model_parallel_rank() == 0
        if parallel_state.get_context_parallel_world_size() > 1:
            noise.context_group = parallel_state.get_context_parallel_group()
    return rows


def choose_backends(config: Config, device: torch.device) -> None:
    """Choose the attention backend of every stage, so that a later stage cannot end the run after days of training.

    Raises:
        UserError: attention.backend names a backend that cannot serve a stage on this device.
    """
    for name in config.schedule.stages:
        choose_backend(config.attention.backend, _attention_case(at_stage(config, name)), device)


def _attention_case(config: Config) -> AttentionCase:
    return attention_case(config, noise_process(config.diffusion).is_causal)


def sequence_visibility(noisy: NoisyBatch, config: Config, streams: int) -> Visibility:
    """Return which tokens see which in whole sequences, with p * l rows and keys per sample."""
    diffusion, documents = config.diffusion, noisy.document_ids
    if streams == 2:
        assert diffusion.block_size is not None
        return block_diffusion_visibility(
            documents, diffusion.block_size, diffusion.block_index, diffusion.clean_attention, diffusion.noisy_attention
        )
    if noise_process(diffusion).is_causal:
        return causal_visibility(documents)
    if diffusion.attention_annealing == "none" or noisy.annealed >= 1:
        return document_visibility(documents)
    if diffusion.attention_annealing == "extent":
        return causal_visibility(documents, extent=int(noisy.annealed * documents.shape[1]))
    return scattered_visibility(documents, noisy.annealed, config.training.seed, noisy.sample_indices)


def _travel(noisy: NoisyBatch, config: Config, streams: int) -> Travel:
    if config.parallel.context_method == "all_to_all":
        return "heads"
    if streams == 1:
        return "all"
    diffusion, chunk_size = config.diffusion, config.parallel.context_chunk_size
    assert diffusion.block_size is not None
    if blocks_stay_home(noisy.document_ids, diffusion.block_size, diffusion.block_index, chunk_size):
        return "clean"
    _say_that_noisy_keys_travel(diffusion.block_size, chunk_size)
    return "all"


@cache
def _say_that_noisy_keys_travel(block_size: int, chunk_size: int) -> None:
    logger.warning(
        "blocks of %d tokens cross the borders of context-parallel chunks of %d positions, so ranks exchange noisy keys too, which takes "
        "twice the bytes. They exchange clean keys alone if parallel.context_chunk_size is a multiple of the block size and blocks begin "
        "at its multiples (diffusion.block_index=sample, or documents that begin there)",
        block_size,
        chunk_size,
    )


def _ownership(visibility: Visibility, config: Config, streams: int, travel: Travel) -> Ownership:
    num_ranks = config.parallel.context
    if travel == "heads":
        # Every rank computes all positions of its heads, so the work is balanced whatever positions it owns.
        positions = torch.arange(config.data.sequence_length, device=visibility.endpoints.device)
        num_samples = visibility.endpoints.shape[1]
        return Ownership(positions.reshape(1, num_ranks, -1).expand(num_samples, -1, -1), 1.0)
    return deal_positions(visibility, streams, num_ranks, config.parallel.context_chunk_size)


def _assemble(noisy: NoisyBatch, config: Config, streams: int, plan: AttentionPlan, losses: RouterLosses | None) -> ModelInputs:
    length = noisy.input_ids.shape[1]
    first_row = streams * length * torch.arange(len(noisy.input_ids), device=noisy.input_ids.device)[:, None]
    rows = first_row + torch.arange(length, device=first_row.device)
    logit_positions = rows[noisy.loss_mask]
    if noisy.next_mask is not None:
        logit_positions = torch.cat([logit_positions, rows[noisy.next_mask] + length])
    timesteps, segment_index = noisy.segment_timesteps, noisy.segment_index
    input_ids, positions = noisy.input_ids, noisy.positions
    if streams == 2:
        input_ids, positions = torch.cat([input_ids, noisy.tokens], dim=1), torch.cat([positions, positions], dim=1)
        # The clean stream is at t = 0, which is one more row of the condition table.
        clean = torch.full_like(segment_index, len(timesteps))
        timesteps, segment_index = torch.cat([timesteps, timesteps.new_zeros(1)]), torch.cat([segment_index, clean], dim=1)
    return ModelInputs(
        input_ids=input_ids,
        positions=positions,
        attention_plan=plan,
        segment_timesteps=timesteps,
        segment_index=None if samples_are_segments(config) else segment_index,
        logit_positions=logit_positions,
        embedding_noise=_embedding_noise(noisy, config),
        token_kinds=_token_kinds(noisy, config, streams),
        router_losses=losses,
    )


def _token_kinds(noisy: NoisyBatch, config: Config, streams: int) -> Tensor | None:
    if not config.model.experts.num_experts:
        return None
    return token_kinds(noisy.input_ids, noisy.document_ids, config.diffusion.mask_token_id, has_clean_stream=streams == 2)


def _routing_blocks(noisy: NoisyBatch, config: Config, streams: int, positions: Tensor | None = None) -> RoutingBlocks | None:
    """Return the blocks of whole samples, or those of some positions, int64 [b, n]; None without pools of experts."""
    diffusion, experts = config.diffusion, config.model.experts
    if not (experts.num_experts and experts.pool_per_block):
        return None
    assert diffusion.block_size is not None
    num_samples, length = noisy.document_ids.shape
    start, _ = block_bounds(noisy.document_ids, diffusion.block_size, diffusion.block_index)
    start = start.long() if positions is None else start.long().gather(1, positions)
    index = torch.cat([start + stream * length for stream in range(streams)], dim=1)
    sample = torch.arange(num_samples, device=index.device)[:, None]
    return RoutingBlocks(index + sample * streams * length, num_samples * streams * length)


def _router_losses(noisy: NoisyBatch, config: Config, streams: int) -> RouterLosses | None:
    """Return the losses that routers add, from whole samples; None in evaluation, without experts and without such losses."""
    balance = config.balance
    kinds = _token_kinds(noisy, config, streams)
    if kinds is None or not torch.is_grad_enabled() or not (balance.auxiliary or balance.router_z):
        return None
    first = first_counted_kind(balance.streams)
    counted = (kinds >= first).sum(dim=1, dtype=torch.float32)
    return RouterLosses(balance.auxiliary, balance.router_z, first, objective_at(config).denominators(noisy), counted)


def _embedding_noise(noisy: NoisyBatch, config: Config) -> EmbeddingNoise | None:
    """Return the noise for the masked tokens of the noisy stream, whose positions come first; None in evaluation and without such noise."""
    std = config.diffusion.mask_embedding_noise
    if std == 0 or not torch.is_grad_enabled():
        return None
    sample, column = (noisy.input_ids == config.diffusion.mask_token_id).nonzero(as_tuple=True)
    return EmbeddingNoise(std, config.training.seed, sample, column, noisy.sample_indices[sample], noisy.places[sample, column])
