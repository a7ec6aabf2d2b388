"""Texts of two tokens with a table of probabilities, and everything that noise and a model can do to them, by enumeration in float64.

Rows are all combinations of a text x, a noisy text z and a position i. Ids 0, 1 and 2 are words, and id 3 is the mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.per_id_masked import PerIdMaskedProcess
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import value_of
from w1train.objectives.integral import integral_of, needs_reconstruction, prior_divergence
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.losses import bound_of, loss_of
from w1train.objectives.row_loss import RowLoss

NUM_WORDS = 3
MASK = 3
TEXTS = torch.tensor(list(itertools.product(range(NUM_WORDS), repeat=2)))
"""int64 [9, 2]."""
NOISY = torch.tensor(list(itertools.product(range(NUM_WORDS + 1), repeat=2)))
"""int64 [16, 2]."""
PROBABILITIES = torch.tensor([0.3, 0.02, 0.05, 0.01, 0.25, 0.04, 0.02, 0.08, 0.23], dtype=torch.float64)
"""p(x), [9]."""
ENTROPY = -(PROBABILITIES * PROBABILITIES.log()).sum().item()


def tabular_config(**given: object) -> DiffusionConfig:
    return DiffusionConfig(mask_token_id=MASK, num_noise_ids=NUM_WORDS, random_length_probability=0.0, **given)


def likelihoods(process: NoiseProcess, t: float) -> Tensor:
    """Return q_t(z_i | x_i) for each word x_i and each id z_i, [3, 4]."""
    time, words, ids = torch.tensor(t, dtype=torch.float64), torch.arange(NUM_WORDS)[:, None], torch.arange(NUM_WORDS + 1)[None]
    if isinstance(process, PerIdMaskedProcess):
        masked = process.spindle.noising_probability(process.table[words], time)
        return (1 - masked) * (words == ids) + masked * (ids == MASK)
    return process.alpha(time) * (words == ids) + process.noise(time, ids)


def exact_predictions(process: NoiseProcess, t: float, *, full: bool) -> Tensor:
    """Return the posterior of each token in each noisy text, [16, 2, 3], given the other position alone or (``full``) both."""
    of_token = likelihoods(process, t)
    joint = PROBABILITIES.reshape(1, NUM_WORDS, NUM_WORDS).repeat(len(NOISY), 1, 1)
    first, second = of_token[:, NOISY[:, 0]].t(), of_token[:, NOISY[:, 1]].t()  # [16, 3]
    posteriors = [
        (joint * second[:, None, :] * (first[:, :, None] if full else 1)).sum(dim=2),
        (joint * first[:, :, None] * (second[:, None, :] if full else 1)).sum(dim=1),
    ]
    stacked = torch.stack(posteriors, dim=1)
    return stacked / stacked.sum(dim=2, keepdim=True)


def all_rows(process: NoiseProcess, t: float) -> tuple[LossRows, Tensor, Tensor]:
    """Return the rows, the probability p(x) q(z | x) of each, [288], and the place of its noisy text and position in [16 * 2]."""
    of_token = likelihoods(process, t)
    texts, noisy, position = (part.flatten() for part in torch.meshgrid(torch.arange(9), torch.arange(16), torch.arange(2), indexing="ij"))
    inputs, targets = NOISY[noisy, position], TEXTS[texts, position]
    probability = PROBABILITIES[texts] * of_token[TEXTS[texts, 0], NOISY[noisy, 0]] * of_token[TEXTS[texts, 1], NOISY[noisy, 1]]
    is_noised = (inputs != targets) if not process.predicts_every_token else torch.ones_like(inputs, dtype=torch.bool)
    timesteps = torch.full(inputs.shape, t, dtype=torch.float64)
    count = torch.tensor(len(inputs))
    rows = LossRows(targets, inputs, is_noised, timesteps, torch.ones_like(timesteps), count, count, None)
    return rows, probability, noisy * 2 + position


def row_values(loss: RowLoss, rows: LossRows, predictions: Tensor) -> Tensor:
    """Return the loss of each row, from predictions [m, 3] of words."""
    logits = torch.cat([predictions.log(), torch.full_like(predictions[:, :1], -math.inf)], dim=1)
    return loss.value({name: value_of(term, logits) for name, term in loss.row_terms(rows).items()}, rows)


def mean_density(loss: RowLoss, t: float, predictions: Tensor) -> float:
    """Return the mean over texts and noise of the sum over positions of the bound's density at t. ``predictions``: [16, 2, 3]."""
    rows, probability, place = all_rows(loss.process, t)
    possible = (probability > 0) & (rows.is_noised if not loss.process.predicts_every_token else True)
    densities = row_values(loss, rows, predictions.flatten(0, 1)[place]) * loss.elbo_weight(rows.timesteps, rows.inputs, rows.targets)
    return (densities * probability)[possible].sum().item()


def negative_elbo(config: DiffusionConfig, predict, num_points: int) -> float:
    """Return the mean of the whole bound over the texts, as validation computes it. ``predict``: t -> [16, 2, 3]."""
    bound = bound_of(config)
    integral = integral_of(config, midpoints(num_points))
    total = sum(rate * mean_density(bound, t, predict(t)) for t, rate in zip(integral.timesteps, integral.rates, strict=True)) / num_points
    total += 2 * prior_divergence(bound.process, integral.last, NUM_WORDS, MASK)
    if needs_reconstruction(bound.process, integral.first):
        total += mean_density(loss_of(replace(config, loss="reconstruction")), integral.first, predict(integral.first))
    return total


def midpoints(num_points: int) -> Sequence[float]:
    return [(place + 0.5) / num_points for place in range(num_points)]
