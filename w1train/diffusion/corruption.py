"""The forward process of masked diffusion on packed samples, and what each position is to predict.

Shapes: b = samples, l = sequence_length, g = segments per sample (stretches of tokens that share one t).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.data.documents import block_ordinals, document_bounds
from w1train.diffusion.philox import Purpose, random_words
from w1train.diffusion.timesteps import draw_fractions, mask_thresholds, timesteps_from_fractions


@dataclass(slots=True)
class NoisyBatch:
    """A corrupted micro-batch: what the model and the loss see."""

    input_ids: Tensor
    """int64 [b, l]: the tokens, masked ones replaced by the mask token."""
    tokens: Tensor
    """int64 [b, l]: the clean tokens."""
    targets: Tensor
    """int64 [b, l]: what the output at each position predicts: its own token, or with ``shift`` the next one."""
    loss_mask: Tensor
    """bool [b, l]: outputs that a loss is taken of (whose targets are masked; never padding)."""
    has_target: Tensor
    """bool [b, l]: outputs whose target could have been masked: the tokens that the objective is a likelihood of."""
    weights: Tensor
    """float32 [b, l]: weight of the loss of each output."""
    target_timesteps: Tensor
    """float32 [b, l]: t of each output's target, for the ELBO and the loss by t (not seen by the model)."""
    next_targets: Tensor | None
    """int64 [b, l]: what the clean stream predicts, the next token; None without an autoregressive loss."""
    next_mask: Tensor | None
    """bool [b, l]: whether that is a token of the same document."""
    document_ids: Tensor
    """int32 [b, l]: as in PackedBatch, after a cut to random length; -1 on padding."""
    positions: Tensor
    """int32 [b, l]."""
    places: Tensor
    """int64 [b, l]: position inside the sample."""
    segment_index: Tensor
    """int64 [b, l]: row of segment_timesteps for each token."""
    segment_timesteps: Tensor
    """float32 [b * g]: t of each segment, one row of the conditioning table each."""
    sample_indices: Tensor
    """int64 [b]."""
    annealed: float = 1.0
    """How far the mask is on its way from causal to the whole document."""
    _loss_timesteps_and_weights: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def loss_timesteps_and_weights(self) -> tuple[Tensor, Tensor]:
        """(t of the targets, weights), float32 [m], where a loss is taken. Kept, for picking them asks a GPU how many there are: asked
        for before the forward pass, they are at hand when the loss wants them."""
        if self._loss_timesteps_and_weights is None:
            where = self.loss_mask.nonzero(as_tuple=True)
            self._loss_timesteps_and_weights = self.target_timesteps[where], self.weights[where]
        return self._loss_timesteps_and_weights

    def at(self, positions: Tensor) -> NoisyBatch:
        """The batch at some positions of each sample, int64 [b, n]: a context-parallel rank's part of one global draw."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        shared = ("segment_timesteps", "sample_indices", "annealed")
        return NoisyBatch(
            **{name: value if name in shared or value is None else value.gather(1, positions) for name, value in values.items()}
        )

    @property
    def num_tokens(self) -> Tensor:
        """int64 scalar: tokens that can be predicted."""
        return self.has_target.sum()


def corrupt(batch: PackedBatch, config: DiffusionConfig, seed: int, *, draw: int = 0) -> NoisyBatch:
    """Training corruption: random t, i.i.d. masking at probability t (LLaDA eq. 3; MDLM with alpha_t = 1 - t).

    Pure in (seed, batch.sample_indices, draw): the same for every layout, device and micro-batch size.
    """
    # Partners of a pair share every random number, those of the cut too.
    keys = torch.div(batch.sample_indices, 2, rounding_mode="floor") if config.complementary else batch.sample_indices
    batch = cut_to_random_length(batch, config, seed, keys, draw=draw)
    if config.objective == "autoregressive":
        return _next_tokens(batch, config)
    segment = _segments(batch, config)
    # One column for every possible segment would be l wide; the largest that occurs bounds it. The columns beyond a
    # sample's own segments are rows of the table that no token points to. (Asking a GPU for the largest waits for it.)
    num_segments = 1 if config.timestep_per == "sequence" else int(segment.max()) + 1
    fractions = draw_fractions(config, seed, keys, num_segments, draw)
    timesteps = timesteps_from_fractions(config, fractions)
    return _mask_tokens(batch, config, seed, timesteps, segment, keys, draw)


def corrupt_at(batch: PackedBatch, config: DiffusionConfig, seed: int, timestep: float, *, draw: int) -> NoisyBatch:
    """Corruption of whole samples at one given t in (0, 1] with the fixed noise of ``draw``: for validation."""
    if config.objective == "autoregressive":
        return _next_tokens(batch, config)
    timesteps = torch.full((len(batch.sample_indices), 1), timestep, dtype=torch.float64, device=batch.tokens.device)
    return _mask_tokens(batch, config, seed, timesteps, torch.zeros_like(batch.tokens), batch.sample_indices, draw, paired=False)


def _segments(batch: PackedBatch, config: DiffusionConfig) -> Tensor:
    """Ordinal inside its sample of the segment each token belongs to, int64 [b, l]."""
    if config.timestep_per == "block":
        assert config.block_size is not None
        return block_ordinals(batch.document_ids, config.block_size, config.block_index)
    if config.timestep_per == "document":
        return batch.document_ids.clamp_min(0).to(torch.int64)
    return torch.zeros_like(batch.tokens)


def cut_to_random_length(batch: PackedBatch, config: DiffusionConfig, seed: int, keys: Tensor, *, draw: int = 0) -> PackedBatch:
    """With probability random_length_probability, keep the first U{1..l} tokens of a sample; the rest becomes padding.

    LLaDA cuts a whole batch at once; a cut per sample is the same distribution and does not depend on the batch.

    Args:
        keys: int64 [b], what the random numbers belong to.
    """
    if config.random_length_probability == 0.0:
        return batch
    length = batch.tokens.shape[1]
    words = random_words(seed, keys, draw=draw, purpose=Purpose.LENGTH, num=2)
    cut = words[:, 0] < int(config.random_length_probability * (1 << 32))
    kept = torch.where(cut, 1 + ((words[:, 1] * length) >> 32), length)
    beyond = torch.arange(length, device=batch.tokens.device)[None, :] >= kept[:, None]
    return replace(
        batch,
        document_ids=torch.where(beyond, -1, batch.document_ids),
        positions=torch.where(beyond, 0, batch.positions),
        may_be_noised=batch.may_be_noised & ~beyond,
    )


def _mask_tokens(
    batch: PackedBatch,
    config: DiffusionConfig,
    seed: int,
    timesteps: Tensor,
    segment: Tensor,
    keys: Tensor,
    draw: int,
    *,
    paired: bool = True,
) -> NoisyBatch:
    """Mask by comparing 32-bit words. timesteps: float64 [b, g]; segment: int64 [b, l] in [0, g); keys: int64 [b].

    ``paired``: whether samples of odd index are the partners of those before them, if the objective is complementary.
    """
    num_samples, length = batch.tokens.shape
    words = random_words(seed, keys, draw=draw, purpose=Purpose.MASK, num=length)
    masked = words < _at_tokens(mask_thresholds(timesteps), segment)
    if config.complementary and paired:
        is_partner = (batch.sample_indices % 2 == 1)[:, None]
        masked, timesteps = masked ^ is_partner, torch.where(is_partner, 1 - timesteps, timesteps)
    can_be_masked = batch.document_ids >= 0
    if config.shift:
        can_be_masked &= ~_starts_document(batch.document_ids)
    # A mask token in the data can be no target: its probability is zero.
    masked &= can_be_masked & (batch.tokens != config.mask_token_id)
    token_timesteps = _at_tokens(timesteps.float(), segment).contiguous()
    weights = loss_weights(config, token_timesteps, masked, can_be_masked, segment)
    # What belongs to a token moves to the output that predicts it.
    moved = _next if config.shift else lambda tensor: tensor
    next_mask = _next_mask(batch, config) if config.autoregressive_weight > 0 else None
    rows = torch.arange(num_samples, device=segment.device)[:, None] * timesteps.shape[1]
    return NoisyBatch(
        input_ids=torch.where(masked, config.mask_token_id, batch.tokens),
        tokens=batch.tokens,
        targets=moved(batch.tokens),
        loss_mask=moved(masked),
        has_target=moved(can_be_masked),
        weights=moved(weights),
        target_timesteps=moved(token_timesteps),
        next_targets=None if next_mask is None else _next(batch.tokens),
        next_mask=next_mask,
        document_ids=batch.document_ids,
        positions=batch.positions,
        places=_places(batch),
        segment_index=rows + segment,
        segment_timesteps=timesteps.flatten().float(),
        sample_indices=batch.sample_indices,
    )


def _at_tokens(values: Tensor, segment: Tensor) -> Tensor:
    """What each token's segment has: [b, g] to [b, l]."""
    return values.expand(segment.shape) if values.shape[1] == 1 else values.gather(1, segment)


def _next_tokens(batch: PackedBatch, config: DiffusionConfig) -> NoisyBatch:
    """Autoregression as a batch like any other: clean text at t = 0 (one segment a sample), every token predicting the next one of its
    document, as the last step of a reverse process would: t = 1 for the loss."""
    has_next = _next_mask(batch, config)
    ones = torch.ones(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    return NoisyBatch(
        input_ids=batch.tokens,
        tokens=batch.tokens,
        targets=_next(batch.tokens),
        loss_mask=has_next,
        has_target=has_next,
        weights=ones,
        target_timesteps=ones,
        next_targets=None,
        next_mask=None,
        document_ids=batch.document_ids,
        positions=batch.positions,
        places=_places(batch),
        segment_index=rows[:, None].expand_as(batch.tokens),
        segment_timesteps=ones.new_zeros(len(batch.tokens)),
        sample_indices=batch.sample_indices,
    )


def loss_weights(config: DiffusionConfig, timesteps: Tensor, masked: Tensor, can_be_masked: Tensor, segment: Tensor) -> Tensor:
    """Weight of each masked token's cross-entropy, float32 [b, l].

    inverse_t: w = -alpha'_t / (1 - alpha_t) = 1/t, the ELBO (LLaDA2.0 prints the opposite sign in eq. 1; masks.md G13).
    inverse_fraction: the masked share of the segment that came about instead of its expectation t (MegaDLMs).
    one_minus_t: GIDD's follow-up.
    """
    if config.weight == "inverse_t":
        return 1.0 / timesteps
    if config.weight == "one_minus_t":
        return 1.0 - timesteps
    if config.weight == "constant":
        return torch.ones_like(timesteps)
    counts = torch.zeros((2, *segment.shape), device=segment.device)  # a segment's number is below l
    for count, chosen in zip(counts, (can_be_masked, masked), strict=True):
        count.scatter_add_(1, segment, chosen.float())
    return (counts[0] / counts[1].clamp_min(1.0)).gather(1, segment)


def _next(tensor: Tensor) -> Tensor:
    """What belongs to the position behind each one, [b, l]; the last one's is zero."""
    return torch.cat([tensor[:, 1:], torch.zeros_like(tensor[:, :1])], dim=1)


def _next_mask(batch: PackedBatch, config: DiffusionConfig) -> Tensor:
    """bool [b, l]: whether the position behind is of the same document, and no mask token, which has no probability."""
    real = batch.document_ids >= 0
    return _next(real & ~_starts_document(batch.document_ids) & (batch.tokens != config.mask_token_id))


def _starts_document(document_ids: Tensor) -> Tensor:
    start, _ = document_bounds(document_ids)
    return start == torch.arange(document_ids.shape[1], device=document_ids.device)


def _places(batch: PackedBatch) -> Tensor:
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
