"""The forward process of masked diffusion on packed samples.

Shapes: b = samples, l = sequence_length, g = segments per sample (stretches of tokens that share one t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.data.documents import block_ordinals
from w1train.diffusion.philox import Purpose, random_words
from w1train.diffusion.timesteps import draw_fractions, mask_thresholds, timesteps_from_fractions


@dataclass(slots=True)
class NoisyBatch:
    """A corrupted micro-batch: what the model and the loss see."""

    input_ids: Tensor
    """int64 [b, l]: the tokens, masked ones replaced by the mask token."""
    targets: Tensor
    """int64 [b, l]: the clean tokens."""
    loss_mask: Tensor
    """bool [b, l]: where a loss is taken (the masked tokens; never padding)."""
    token_timesteps: Tensor
    """float32 [b, l]: t of each token, for weights and for the loss by t (not seen by the model)."""
    document_ids: Tensor
    """int32 [b, l]: as in PackedBatch, after a cut to random length; -1 on padding."""
    positions: Tensor
    """int32 [b, l]."""
    segment_timesteps: Tensor
    """float32 [b * g]: t of each segment, one row of the conditioning table each."""
    segment_index: Tensor
    """int64 [b, l]: row of segment_timesteps for each token."""

    def at(self, positions: Tensor) -> NoisyBatch:
        """The batch at some positions of each sample, int64 [b, n]: a context-parallel rank's part of one global draw."""
        return NoisyBatch(
            input_ids=self.input_ids.gather(1, positions),
            targets=self.targets.gather(1, positions),
            loss_mask=self.loss_mask.gather(1, positions),
            token_timesteps=self.token_timesteps.gather(1, positions),
            document_ids=self.document_ids.gather(1, positions),
            positions=self.positions.gather(1, positions),
            segment_timesteps=self.segment_timesteps,
            segment_index=self.segment_index.gather(1, positions),
        )

    @property
    def num_tokens(self) -> Tensor:
        """int64 scalar: real tokens."""
        return (self.document_ids >= 0).sum()


def corrupt(batch: PackedBatch, config: DiffusionConfig, seed: int, *, draw: int = 0) -> NoisyBatch:
    """Training corruption: random t, i.i.d. masking at probability t (LLaDA eq. 3; MDLM with alpha_t = 1 - t).

    Pure in (seed, batch.sample_indices, draw): the same for every layout, device and micro-batch size.
    """
    batch = cut_to_random_length(batch, config, seed, draw=draw)
    segment = _segments(batch, config)
    # One column for every possible segment would be l wide; the largest that occurs bounds it. The columns beyond a
    # sample's own segments are rows of the table that no token points to.
    fractions = draw_fractions(config, seed, batch.sample_indices, int(segment.max()) + 1, draw)
    timesteps = timesteps_from_fractions(config, fractions)
    return _mask_tokens(batch, config, seed, timesteps, segment, draw)


def _segments(batch: PackedBatch, config: DiffusionConfig) -> Tensor:
    """Ordinal inside its sample of the segment each token belongs to, int64 [b, l]."""
    if config.timestep_per == "block":
        assert config.block_size is not None
        return block_ordinals(batch.document_ids, config.block_size, config.block_index)
    if config.timestep_per == "document":
        return batch.document_ids.clamp_min(0).to(torch.int64)
    return torch.zeros_like(batch.tokens)


def corrupt_at(batch: PackedBatch, config: DiffusionConfig, seed: int, timestep: float, *, draw: int) -> NoisyBatch:
    """Corruption of whole samples at one given t in (0, 1] with the fixed noise of ``draw``: for validation."""
    timesteps = torch.full((len(batch.sample_indices), 1), timestep, dtype=torch.float64, device=batch.tokens.device)
    return _mask_tokens(batch, config, seed, timesteps, torch.zeros_like(batch.tokens), draw)


def cut_to_random_length(batch: PackedBatch, config: DiffusionConfig, seed: int, *, draw: int = 0) -> PackedBatch:
    """With probability random_length_probability, keep the first U{1..l} tokens of a sample; the rest becomes padding.

    LLaDA cuts a whole batch at once; a cut per sample is the same distribution and does not depend on the batch.
    """
    if config.random_length_probability == 0.0:
        return batch
    length = batch.tokens.shape[1]
    words = random_words(seed, batch.sample_indices, draw=draw, purpose=Purpose.LENGTH, num=2)
    cut = words[:, 0] < int(config.random_length_probability * (1 << 32))
    kept = torch.where(cut, 1 + ((words[:, 1] * length) >> 32), length)
    beyond = torch.arange(length, device=batch.tokens.device)[None, :] >= kept[:, None]
    return PackedBatch(
        tokens=batch.tokens,
        document_ids=batch.document_ids.masked_fill(beyond, -1),
        positions=batch.positions.masked_fill(beyond, 0),
        sample_indices=batch.sample_indices,
    )


def _mask_tokens(batch: PackedBatch, config: DiffusionConfig, seed: int, timesteps: Tensor, segment: Tensor, draw: int) -> NoisyBatch:
    """Mask by comparing 32-bit words. timesteps: float64 [b, g]; segment: int64 [b, l] in [0, g)."""
    num_samples, length = batch.tokens.shape
    words = random_words(seed, batch.sample_indices, draw=draw, purpose=Purpose.MASK, num=length)
    masked = (words < mask_thresholds(timesteps).gather(1, segment)) & (batch.document_ids >= 0)
    # A mask token in the data can be no target: its probability is zero.
    masked &= batch.tokens != config.mask_token_id
    rows = torch.arange(num_samples, device=segment.device)[:, None] * timesteps.shape[1]
    return NoisyBatch(
        input_ids=batch.tokens.masked_fill(masked, config.mask_token_id),
        targets=batch.tokens,
        loss_mask=masked,
        token_timesteps=timesteps.gather(1, segment).float(),
        document_ids=batch.document_ids,
        positions=batch.positions,
        segment_timesteps=timesteps.flatten().float(),
        segment_index=rows + segment,
    )
