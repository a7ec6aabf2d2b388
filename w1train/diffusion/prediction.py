"""The two meanings of a model's distribution at a position, and the maps between them and from scores.

leave_one_out is p(x_i | z of all other positions). full is p(x_i | z): it also knows the noised token z_i at the position itself. By
Bayes' rule the full distribution is the normalised product of q_t(z_i | x) = alpha_t [z_i = x] + c_t(z_i) and the other, so it differs by
one logit:

    full = softmax(leave_one_out + log(1 + alpha_t / c_t(z_i)) at the id z_i)

(arXiv 2605.22765). Where z_i is the mask token, which no token of the text is, both are the same.

Scores are the ratios q_t(y | leave_one_out) / q_t(z_i | leave_one_out) (SEDD, arXiv 2310.16834). Under masked noise they are proportional
to the distribution, so that it is their softmax. Under uniform noise the noise has to be taken out of them.

Shapes: n = positions, v = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.diffusion.process import NoiseProcess

_SMALLEST_NOISE = 1e-30
"""If noise cannot put an id in the place of others, the evidence for it has no bound. Infinite logits would make NaN of rows that have the
weight 0."""


def evidence(process: NoiseProcess, timesteps: Tensor, ids: Tensor) -> Tensor:
    """Return log(1 + alpha_t / c_t(z)), how much more probable the text has the id z where noise shows z, float64 in the broadcast shape of
    both arguments."""
    times = timesteps.double()
    return torch.log1p(process.alpha(times) / process.noise(times, ids).clamp_min(_SMALLEST_NOISE))


def full_from_leave_one_out(logits: Tensor, ids: Tensor, evidence: Tensor) -> Tensor:
    """Return logits of the full distribution, [n, v].

    Args:
        logits: [n, v] of the leave-one-out distribution, up to a constant in each row.
        ids: int64 [n], the noised tokens at the positions.
        evidence: [n], of these tokens.
    """
    return logits.scatter_add(1, ids[:, None], evidence[:, None].to(logits.dtype))


def leave_one_out_from_full(logits: Tensor, ids: Tensor, evidence: Tensor) -> Tensor:
    """Return logits of the leave-one-out distribution, [n, v]: the inverse of ``full_from_leave_one_out``."""
    return full_from_leave_one_out(logits, ids, -evidence)


def leave_one_out_from_scores(logits: Tensor, ids: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
    """Return log-probabilities of the leave-one-out distribution, [n, v], from logarithms of scores of uniform noise: q_t = alpha p + c is
    solved for p. Where a model's scores belong to no distribution and p is negative, p is 0.

    Args:
        logits: [n, v], -inf at ids that are no ids of the noise.
        ids: int64 [n], the noised tokens at the positions. Their own score is 1, whatever the model says, because it is not trained.
        alpha, noise: [n], alpha_t and c_t of one id.
    """
    laws = logits.scatter(1, ids[:, None], 0.0).softmax(dim=1)
    signals = torch.where(logits.isfinite(), (laws - noise[:, None]) / alpha[:, None], 0.0).clamp_min(0.0)
    return (signals / signals.sum(dim=1, keepdim=True)).log()
