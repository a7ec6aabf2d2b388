"""The bound of masks with learned rates, and its gradient for the rates (GenMD4, arXiv 2406.04329, section 6).

The rates decide which tokens are masked, so the mean of a loss f over the noisy texts z has a gradient for them through q(z | x) too:

    grad E f = E [grad f + f grad log q(z | x)].

The factor f would make the second part vary much. With two draws z1 and z2 of the same text at the same t, the gradient of

    (f1 + f2) / 2 + (f1 - f2) (log q(z1 | x) - log q(z2 | x)) / 2,   with f1 - f2 as a constant,

has the same mean and varies less (REINFORCE leave-one-out, arXiv 2406.04329, section 6). Samples come in such pairs
(diffusion.coupled_draws), and the loss is a mean over samples, so each sample adds f and (f - f of its partner) log q.

Shapes: m, k as in LossRows; b, l, g as in LearnedNoise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.diffusion.learned_masked import log_probability, rates_at, reconstruction
from w1train.model.row_terms import RowTerm, WeightedCrossEntropy
from w1train.objectives.loss_rows import LearnedNoise, LossRows
from w1train.objectives.per_id import PerIdLoss
from w1train.objectives.row_loss import for_all_rows


class LearnedPerIdLoss(PerIdLoss):
    """(w_x (-log p(x) - 1) + the mean of w over the prediction) / t at masked tokens."""

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        assert rows.learned_noise is not None, "the model has no rates"
        timesteps = for_all_rows(rows, rows.timesteps, 0.5)
        return {"per_id": WeightedCrossEntropy(rows.targets, rows.learned_noise.rates, timesteps, rates_at)}

    def total(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        noise = rows.learned_noise
        assert noise is not None
        losses = self.value(values, rows)
        total = (losses * rows.weights).sum() + self.end_terms(rows).to(losses.dtype)
        # Only training has partners.
        return total + _score_term(losses.detach(), noise, self._known(noise)).to(losses.dtype) if noise.rates.requires_grad else total

    def end_terms(self, rows: LossRows) -> Tensor:
        noise = rows.learned_noise
        assert noise is not None
        smallest = self.config.t_min
        of_tokens = reconstruction(noise.rates_of_tokens.double(), noise.tokens, smallest, self.config.mask_token_id)
        # The mean over t is the integral from t_min to 1, divided by its length. The bound divided by this length has this part of the end.
        of_tokens = of_tokens / (1 - smallest)
        return torch.where(self._known(noise), of_tokens, 0.0).sum()

    def _known(self, noise: LearnedNoise) -> Tensor:
        """Return the tokens that may be masked, bool [b, l]. A mask token in the text can be no target."""
        return noise.can_be_noised & ~self.process.is_noised(noise.tokens)


def _score_term(losses: Tensor, noise: LearnedNoise, known: Tensor) -> Tensor:
    """Return the sum of (f - f of the partner) log q(z | x), whose value means nothing and whose gradient is the score-function term.

    f is the sum over a segment: tokens of other segments do not see its noise.

    Args:
        losses: [m], without a gradient.
        known: bool [b, l], the tokens that noise can replace.
    """
    num_samples = len(noise.tokens)
    assert num_samples % 2 == 0, "both samples of a pair are in one micro-batch"
    of_segments = losses.new_zeros(num_samples * noise.num_segments, dtype=torch.float64)
    of_segments.index_add_(0, noise.segments_of_rows, losses.double())
    if noise.context_group is not None:
        dist.all_reduce(of_segments, group=noise.context_group)
    pairs = of_segments.reshape(num_samples // 2, 2, noise.num_segments)
    excess = (pairs - pairs.flip(1)).flatten()[noise.segments]
    # Padding may be at t = 0, and the gradient of its logarithm would be NaN even if it counts zero times.
    timesteps = torch.where(known, noise.timesteps, 0.5).double()
    log_q = log_probability(noise.rates_of_tokens.double()[noise.tokens], timesteps, noise.is_noised)
    return torch.where(known, excess * log_q, 0.0).sum()
