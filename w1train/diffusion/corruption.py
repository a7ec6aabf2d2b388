"""Corrupted batches: packed samples after noise, and what each output of the model is to predict.

Shapes: b = samples, l = sequence_length, g = segments per sample (stretches of tokens that share one t).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.data.documents import document_bounds
from w1train.diffusion.philox import Purpose, random_words
from w1train.diffusion.process import NoiseDraw, has_predecessor
from w1train.diffusion.processes import noise_process

Extent = Literal["token", "segment", "sample"]


_PER_TOKEN: dict[str, Extent] = {"per": "token"}
_PER_SEGMENT: dict[str, Extent] = {"per": "segment"}
_PER_SAMPLE: dict[str, Extent] = {"per": "sample"}


@dataclass(slots=True)
class NoisyBatch:
    """A corrupted micro-batch: what the model and the loss see.

    The declaration of each tensor says whether the tensor has a value per token, per segment or per sample. Code that treats all tensors
    alike (a part of the positions, the file of a bad batch) asks ``names`` for them, so that a new field is never left out.
    """

    input_ids: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: the tokens after noise."""
    tokens: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: the clean tokens."""
    targets: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: the token that the output at each position predicts: the token at this position, or with ``shift`` the next token."""
    target_inputs: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: the token after noise at the place of each output's target."""
    target_is_noised: Tensor = field(metadata=_PER_TOKEN)
    """bool [b, l]: True for outputs whose target noise has replaced (in autoregression: that have a loss)."""
    loss_mask: Tensor = field(metadata=_PER_TOKEN)
    """bool [b, l]: True for outputs that have a loss. Their targets are noised tokens, or any tokens if the process predicts every token or
    is autoregressive, and never padding."""
    has_target: Tensor = field(metadata=_PER_TOKEN)
    """bool [b, l]: True for outputs whose target could have been noised. The objective bounds the likelihood of these targets."""
    target_timesteps: Tensor = field(metadata=_PER_TOKEN)
    """float32 [b, l]: t of each output's target, for the loss (the model does not see it)."""
    target_segments: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: segment of each output's target, counted inside the sample."""
    next_targets: Tensor | None = field(metadata=_PER_TOKEN)
    """int64 [b, l]: the next token, which the clean stream predicts; None without an autoregressive loss."""
    next_mask: Tensor | None = field(metadata=_PER_TOKEN)
    """bool [b, l]: True for outputs of the clean stream that have a loss: those whose next token is in the same document."""
    document_ids: Tensor = field(metadata=_PER_TOKEN)
    """int32 [b, l]: as in PackedBatch, after a cut to random length; -1 on padding."""
    positions: Tensor = field(metadata=_PER_TOKEN)
    """int32 [b, l]: as in PackedBatch."""
    places: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: position inside the sample."""
    segment_index: Tensor = field(metadata=_PER_TOKEN)
    """int64 [b, l]: row of segment_timesteps for each token."""
    segment_timesteps: Tensor = field(metadata=_PER_SEGMENT)
    """float32 [b * g]: t of each segment. Each segment has one row of the conditioning table."""
    sample_indices: Tensor = field(metadata=_PER_SAMPLE)
    """int64 [b]."""
    units: Tensor | None = field(default=None, metadata=_PER_TOKEN)
    """int64 [b, l]: the part of each output in the number of units (samples, documents or positions) that the loss is divided by. Only the
    first output of a unit that has a target has a part, so only one context-parallel rank counts the unit. None where the loss is divided
    by a number of tokens."""
    noise_rates: Tensor | None = None
    """float32 [vocabulary]: the rates of noise that the process has learned; None if it learns none."""
    annealed: float = 1.0
    """The progress of the attention mask from causal (0) to the whole document (1)."""
    first_sample: int = 0
    """The index of the first sample of the global batch."""
    measured: Mapping[str, Tensor] | None = None
    """Sums over the global batch, by name, that a pass without gradients has computed before (w1train/training/measurement.py); None if the
    objective needs no such pass, and in that pass itself."""

    def names(self, per: Extent) -> list[str]:
        """Return the names of the tensors that have one value per token, segment or sample. A tensor that is None has no name here."""
        return [entry.name for entry in fields(self) if entry.metadata.get("per") == per and getattr(self, entry.name) is not None]

    def at(self, positions: Tensor) -> NoisyBatch:
        """Return the batch at some positions of each sample, int64 [b, n]. A context-parallel rank gets its part of the global draw in this
        way."""
        return dataclasses.replace(self, **{name: getattr(self, name).gather(1, positions) for name in self.names("token")})

    @property
    def num_tokens(self) -> Tensor:
        """int64 scalar: tokens that can be predicted."""
        return self.has_target.sum()


def corrupt(batch: PackedBatch, config: DiffusionConfig, seed: int, *, draw: int = 0, rates: Tensor | None = None) -> NoisyBatch:
    """Corrupt a batch for training, each segment at a random t.

    The result depends only on (seed, batch.sample_indices, draw, rates), so it is the same for every layout, device and micro-batch size.

    Args:
        rates: [vocabulary], the rates of noise that the model has learned; None for a process that learns none.
    """
    pairs = torch.div(batch.sample_indices, 2, rounding_mode="floor")
    # Complementary partners share every random number. Coupled partners have noise of their own on the same text, so they share a cut.
    keys = pairs if config.complementary else batch.sample_indices
    batch = cut_to_random_length(batch, config, seed, pairs if config.coupled_draws else keys, draw=draw)
    return _corrupt(batch, config, NoiseDraw(seed, keys, draw), rates)


def corrupt_at(
    batch: PackedBatch, config: DiffusionConfig, seed: int, timestep: float, *, draw: int, rates: Tensor | None = None
) -> NoisyBatch:
    """Corrupt whole samples at one given t in (0, 1] with the fixed noise of ``draw``, for validation. ``rates`` as in ``corrupt``."""
    return _corrupt(batch, config, NoiseDraw(seed, batch.sample_indices, draw, timestep), rates)


def cut_to_random_length(batch: PackedBatch, config: DiffusionConfig, seed: int, keys: Tensor, *, draw: int = 0) -> PackedBatch:
    """Keep the first U{1..l} tokens of a sample with probability random_length_probability; the rest becomes padding.

    LLaDA cuts a whole batch at once; a cut per sample is the same distribution and does not depend on the batch.

    Args:
        keys: int64 [b], the key of the random numbers of each sample.
    """
    if config.random_length_probability == 0.0:
        return batch
    length = batch.tokens.shape[1]
    words = random_words(seed, keys, draw=draw, purpose=Purpose.LENGTH, num=2)
    cut = words[:, 0] < int(config.random_length_probability * (1 << 32))
    kept = torch.where(cut, 1 + ((words[:, 1] * length) >> 32), length)
    beyond = torch.arange(length, device=batch.tokens.device)[None, :] >= kept[:, None]
    return dataclasses.replace(
        batch,
        document_ids=torch.where(beyond, -1, batch.document_ids),
        positions=torch.where(beyond, 0, batch.positions),
        may_be_noised=batch.may_be_noised & ~beyond,
    )


def _corrupt(batch: PackedBatch, config: DiffusionConfig, draw: NoiseDraw, rates: Tensor | None) -> NoisyBatch:
    """Let the configured process corrupt the batch, and move the values of each token to the output that predicts the token."""
    process = noise_process(config, rates)
    corruption = process.corrupt(batch, config, draw)
    moved = _next if corruption.shift else _unmoved
    num_samples, length = batch.tokens.shape
    rows = torch.arange(num_samples, device=batch.tokens.device)[:, None] * corruption.segment_timesteps.shape[1]
    has_target = moved(corruption.predictable)
    next_mask = _next_mask(batch, config) if config.autoregressive_weight > 0 and not process.is_causal else None
    return NoisyBatch(
        input_ids=corruption.input_ids,
        tokens=batch.tokens,
        targets=moved(batch.tokens),
        target_inputs=moved(corruption.input_ids),
        target_is_noised=moved(corruption.noised),
        loss_mask=moved(corruption.predicted),
        has_target=has_target,
        target_timesteps=moved(corruption.timesteps),
        target_segments=moved(corruption.segments),
        next_targets=None if next_mask is None else _next(batch.tokens),
        next_mask=next_mask,
        document_ids=batch.document_ids,
        positions=batch.positions,
        places=torch.arange(length, device=batch.tokens.device).expand_as(batch.tokens),
        segment_index=rows + corruption.segments,
        segment_timesteps=corruption.segment_timesteps.flatten().float(),
        sample_indices=batch.sample_indices,
        noise_rates=rates,
        units=_units(has_target, batch.document_ids, config) if counts_units(config) else None,
    )


def counts_units(config: DiffusionConfig) -> bool:
    """Return whether the loss is divided by a number of samples, documents or positions. The loss of preferences is a mean over pairs, and
    so over samples."""
    return config.preference_draws > 0 or config.normalizer not in ("tokens", "masked_tokens")


def _units(has_target: Tensor, document_ids: Tensor, config: DiffusionConfig) -> Tensor:
    """Return ``NoisyBatch.units``. A sample without a target, which consists of padding or prompts, counts nothing."""
    number = has_target.cumsum(dim=1)
    if config.normalizer == "documents":
        start, _ = document_bounds(document_ids)
        number = number - torch.nn.functional.pad(number, (1, 0)).gather(1, start.long())
    size = has_target.shape[1] if config.normalizer == "positions" else 1
    return size * (has_target & (number == 1)).long()


def _next(tensor: Tensor) -> Tensor:
    """Return for each position the value of the next position, [b, l]; the last position gets zero."""
    return torch.cat([tensor[:, 1:], torch.zeros_like(tensor[:, :1])], dim=1)


def _unmoved(tensor: Tensor) -> Tensor:
    return tensor


def _next_mask(batch: PackedBatch, config: DiffusionConfig) -> Tensor:
    """Return where the next token is a target of the clean stream, bool [b, l]: it is of the same document and may be noised, and it is no
    mask token, whose probability is zero."""
    return _next(batch.may_be_noised & has_predecessor(batch.document_ids) & (batch.tokens != config.mask_token_id))
