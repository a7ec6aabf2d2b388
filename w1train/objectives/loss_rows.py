"""The rows of the model's output that a loss is computed from, and what the loss knows about them.

It is picked from a noisy batch before the model runs. To pick the rows, the host asks the GPU how many rows there are. If it asked after
the forward pass, it would wait for the model before it launches the backward pass.

Shapes: m = rows of the noisy stream, k = rows of the clean stream, b, l as in NoisyBatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.diffusion.corruption import NoisyBatch


@dataclass(slots=True)
class LearnedNoise:
    """The noise of a process with learned rates, at all tokens of this rank and not only at its rows: what noise has kept says something
    about the rates too. b, l as in NoisyBatch (l: this rank's positions); g = segments of each sample."""

    rates: Tensor
    """float32 [vocabulary]. In training the last pipeline stage has a gradient for them."""
    tokens: Tensor
    """int64 [b, l], the clean tokens."""
    is_noised: Tensor
    """bool [b, l]."""
    can_be_noised: Tensor
    """bool [b, l]: False for padding and prompts."""
    timesteps: Tensor
    """float32 [b, l]."""
    segments: Tensor
    """int64 [b, l]: the segment of each token, counted over the micro-batch: sample * g + segment of the sample."""
    num_segments: int
    """g."""
    segments_of_rows: Tensor
    """int64 [m]: ``segments`` at the rows."""
    context_group: dist.ProcessGroup | None = None
    """The ranks that have the other positions of the samples; None = there are no other positions."""
    counts_once: bool = True
    """True on one rank of those that share the vocabulary: the gradients of rates are added up over these ranks."""

    @property
    def rates_of_tokens(self) -> Tensor:
        """The rates, whose gradient is asked on one rank alone: for numbers that every rank computes in the same way."""
        return self.rates if self.counts_once else self.rates.detach()


@dataclass(slots=True)
class SampleRows:
    """The samples of a micro-batch that the rows come from. b = samples."""

    places: Tensor
    """int64 [b]: the place of each sample in the global batch; below 0 for a sample of padding."""
    places_of_rows: Tensor
    """int64 [m]: the place of each row's sample."""
    num_tokens: Tensor
    """int64 [b]: tokens of each sample that can be predicted, as far as this rank has them."""
    is_counted: Tensor
    """bool [b]: True on the one context-parallel rank that counts the sample; False everywhere for a sample without such tokens."""


@dataclass(slots=True)
class LossRows:
    """The rows that a loss is computed from: first the rows of the noisy stream, in the order of the flattened ``NoisyBatch.loss_mask``,
    and then the rows of the clean stream, in the order of ``NoisyBatch.next_mask``."""

    targets: Tensor
    """int64 [m + k], the tokens that the rows should predict."""
    inputs: Tensor
    """int64 [m], the tokens after noise in the places of the targets."""
    is_noised: Tensor
    """bool [m], True where noise has replaced the target, perhaps by itself."""
    timesteps: Tensor
    """float32 [m], t of the targets."""
    weights: Tensor
    """float32 [m], weights of the losses."""
    num_masked: Tensor
    """int64 scalar: the number of noised rows."""
    num_tokens: Tensor
    """int64 scalar: the number of tokens whose likelihood the objective bounds, whether they are predicted in this draw or not."""
    num_units: Tensor | None
    """int64 scalar: the sum of ``NoisyBatch.units``; None where no loss is divided by it."""
    samples: SampleRows | None = None
    """The samples of the rows; None where no loss is divided by a number of samples, documents or positions."""
    learned_noise: LearnedNoise | None = None
    """None if the process learns no rates."""
    measured: Mapping[str, Tensor] | None = None
    """The sums that a pass without gradients has computed, as in NoisyBatch."""

    def of_noisy_stream(self, values: Tensor) -> Tensor:
        """Return the part of the noisy stream, [m], of values of all rows."""
        return values[: len(self.weights)]

    def of_clean_stream(self, values: Tensor) -> Tensor:
        """Return the part of the clean stream, [k], of values of all rows."""
        return values[len(self.weights) :]


def loss_rows(noisy: NoisyBatch, weights: Tensor) -> LossRows:
    """Pick the rows of a batch. ``weights``, float32 [b, l], are the weights of the losses of all outputs."""
    where = noisy.loss_mask.nonzero(as_tuple=True)
    targets = noisy.targets[where]
    if noisy.next_mask is not None and noisy.next_targets is not None:
        targets = torch.cat([targets, noisy.next_targets[noisy.next_mask]])
    return LossRows(
        targets=targets,
        inputs=noisy.target_inputs[where],
        is_noised=noisy.target_is_noised[where],
        timesteps=noisy.target_timesteps[where],
        weights=weights[where],
        num_masked=(noisy.loss_mask & noisy.target_is_noised).sum(),
        num_tokens=noisy.num_tokens,
        num_units=None if noisy.units is None else noisy.units.sum(),
        samples=None if noisy.units is None else _sample_rows(noisy, noisy.units, where[0]),
        learned_noise=None if noisy.noise_rates is None else _learned_noise(noisy, noisy.noise_rates, where),
        measured=noisy.measured,
    )


def _sample_rows(noisy: NoisyBatch, units: Tensor, samples_of_rows: Tensor) -> SampleRows:
    places = noisy.sample_indices - noisy.first_sample
    return SampleRows(places, places[samples_of_rows], noisy.has_target.sum(dim=1), (units > 0).any(dim=1))


def _learned_noise(noisy: NoisyBatch, rates: Tensor, where: tuple[Tensor, ...]) -> LearnedNoise:
    num_samples = len(noisy.targets)
    num_segments = len(noisy.segment_timesteps) // num_samples
    first = num_segments * torch.arange(num_samples, device=noisy.targets.device)
    segments = first[:, None] + noisy.target_segments
    return LearnedNoise(
        rates=rates,
        tokens=noisy.targets,
        is_noised=noisy.target_is_noised,
        can_be_noised=noisy.has_target,
        timesteps=noisy.target_timesteps,
        segments=segments,
        num_segments=num_segments,
        segments_of_rows=segments[where],
    )
