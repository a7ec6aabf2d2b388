"""Masked diffusion in which some samples are not masked, but edited: tokens are deleted, inserted and substituted (Seed Diffusion, arXiv
2508.02193, section 3.1). All tokens of an edited sample are predicted, so that the model learns to doubt tokens that are no masks.

The paper trains with edits in the last fifth of the steps: a stage of the schedule does this. Its rates are not published, so ours are a
choice: the three kinds are equally probable, and their total grows from 0 with t.

Shapes: b = samples, l = sequence_length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config, DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.data.documents import block_ordinals
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.noise_ids import NoiseIds
from w1train.diffusion.philox import Purpose, random_words
from w1train.diffusion.process import Corruption, NoiseDraw
from w1train.diffusion.timesteps import word_thresholds


@dataclass(frozen=True, slots=True)
class EditsProcess(MaskedProcess):
    """Masked diffusion with edits in a share of the samples. Validation is that of masked diffusion, without edits."""

    ids: NoiseIds = field(kw_only=True)
    edited_share: float = field(kw_only=True)
    """Share of the samples that are edited instead of masked."""
    edit_rate: float = field(kw_only=True)
    """The probability at t = 1 that a token of an edited sample is edited."""
    name: ClassVar[str] = "masked diffusion with edits"
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    needs_noise_ids: ClassVar[bool] = True
    has_complements: ClassVar[bool] = False
    edits_samples: ClassVar[bool] = True

    def predicted_share(self, timesteps: Tensor) -> Tensor:
        return self.edited_share + (1 - self.edited_share) * self.noising_probability(timesteps)

    def corrupt(self, batch: PackedBatch, config: DiffusionConfig, draw: NoiseDraw) -> Corruption:
        """Mask the samples, and edit a share of them instead.

        For the loss, tokens of an edited sample are at t = 1, where the weight 1/t is 1: the paper adds their plain cross-entropy. The
        model gets the share of edited tokens as t, as the sampler would give it.
        """
        masked = MaskedProcess.corrupt(self, batch, config, draw)
        if draw.timestep is not None:
            return masked
        length = batch.tokens.shape[1]
        words = random_words(draw.seed, draw.keys, draw=draw.draw, purpose=Purpose.EDIT, num=1 + 2 * length)
        share = torch.tensor(self.edited_share, dtype=torch.float64, device=words.device)
        is_edited = words[:, :1] < word_thresholds(share)
        rates = self.edit_rate * masked.segment_timesteps
        edited = self._edit(batch, config, rates.gather(1, masked.segments), words[:, 1:].unflatten(1, (2, length)))
        is_target = masked.predictable & (batch.tokens != self.mask_token_id)
        return dataclasses.replace(
            masked,
            input_ids=torch.where(is_edited, edited, masked.input_ids),
            noised=torch.where(is_edited, is_target, masked.noised),
            predicted=torch.where(is_edited, is_target, masked.predicted),
            timesteps=torch.where(is_edited, 1.0, masked.timesteps),
            segment_timesteps=torch.where(is_edited, rates, masked.segment_timesteps),
        )

    def problems(self, config: Config) -> Iterator[Problem]:
        if config.diffusion.loss != "cross_entropy":
            valid = "cross_entropy with diffusion.objective=edits: other losses ask how likely noise makes a token, which edits do not say"
            yield Problem("diffusion.loss", config.diffusion.loss, valid, "diffusion.loss=cross_entropy")
        weight = config.diffusion.weight
        if weight not in ("elbo", "inverse_t", "constant"):
            valid = "inverse_t or constant with diffusion.objective=edits, because the loss of edited samples is at t = 1"
            yield Problem("diffusion.weight", weight, valid, "diffusion.weight=inverse_t")

    def _edit(self, batch: PackedBatch, config: DiffusionConfig, rates: Tensor, words: Tensor) -> Tensor:
        """Return the tokens after edits, int64 [b, l].

        Edits move the tokens after them, but only inside a stretch: a part of one block and document that may be noised. Where a stretch
        got shorter, masks fill its end; where it got longer, its last tokens are lost.

        Args:
            rates: float64 [b, l], the probability that a token is edited.
            words: int64 [b, 2, l].
        """
        first, second, last = (word_thresholds(rates * part / 3) for part in (1, 2, 3))
        kind, new_ids, length = words[:, 0], self.ids.draw(words[:, 1]), words.shape[2]
        is_deleted = batch.may_be_noised & (kind < first)
        is_behind_new = batch.may_be_noised & (kind >= first) & (kind < second)
        is_substituted = batch.may_be_noised & (kind >= second) & (kind < last)
        start, end = _stretches(batch, config)
        growth = is_behind_new.long() - is_deleted.long()
        before = growth.cumsum(dim=1) - growth
        places = torch.arange(length, device=words.device) + before - before.gather(1, start)
        values = torch.where(is_substituted, new_ids, batch.tokens)
        # One more column takes what has no place.
        edited = torch.where(batch.may_be_noised, self.mask_token_id, batch.tokens)
        edited = torch.nn.functional.pad(edited, (0, 1))
        for chosen, at, ids in ((~is_deleted, places + is_behind_new, values), (is_behind_new, places, new_ids)):
            edited.scatter_(1, torch.where(chosen & (at < end), at, length), ids)
        return edited[:, :length]


def _stretches(batch: PackedBatch, config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """Return the first position of each token's stretch and the position after its end, both int64 [b, l]."""
    borders = [batch.document_ids, batch.may_be_noised]
    if config.block_size is not None:
        borders.append(block_ordinals(batch.document_ids, config.block_size, config.block_index))
    changes = torch.stack([values[:, 1:] != values[:, :-1] for values in borders]).any(dim=0)
    length = batch.tokens.shape[1]
    positions = torch.arange(length, device=batch.tokens.device).expand_as(batch.tokens)
    starts = torch.nn.functional.pad(changes, (1, 0), value=True)
    ends = torch.nn.functional.pad(changes, (0, 1), value=True)
    start = torch.where(starts, positions, 0).cummax(dim=1).values
    end = torch.where(ends, positions + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return start, end
