"""Score entropy: the bound of a model whose outputs are ratios of probabilities, which no softmax normalises.

Shapes: m = rows, k = rows of a chunk, v = vocabulary of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.kernels.cross_entropy import on_this_rank
from w1train.model.row_terms.row_term import RowStatistics, RowTerm, Vocabulary


@dataclass(slots=True, frozen=True)
class ScoreEntropy(RowTerm):
    """The score entropy of SEDD (arXiv 2310.16834, definition 3.1), in nats and times q_t(z | x), [m]:

        q(z | x) * sum over y != z of [s_y - R_y log s_y + R_y (log R_y - 1)],   R_y = q(y | x) / q(z | x),   s_y = exp(logit + log_scale).

    With the same weight r_t(z) / q_t(z | x) as ``KlIs`` it is the density of the bound, and the same number if s_y = q(y | p) / q(z | p).
    The sum has all ids of the softmax but z, so noise is masked or uniform: a mask that a token can turn into has no score here.
    """

    targets: Tensor
    """int64 [m]: x, ids in the softmax."""
    inputs: Tensor
    """int64 [m]: z, any ids."""
    alpha: Tensor
    """float32 or float64 [m]: alpha_t."""
    word_noise: Tensor
    """float32 or float64 [m]: c_t of one ordinary id, 0 for masked noise."""
    input_noise: Tensor
    """float32 or float64 [m]: c_t(z), above zero."""
    log_scale: Tensor
    """float32 or float64 [m]: what is added to each logit. In SEDD it is -log(exp(sigma) - 1) - log(number of ordinary ids), where
    alpha = exp(-sigma), for masked noise; and 0 for uniform noise."""

    @property
    def chosen_ids(self) -> Tensor:
        return torch.stack([self.targets, self.inputs])

    @property
    def removed_ids(self) -> Tensor:
        return self.inputs

    @property
    def num_sums(self) -> int:
        return 2

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        return statistics.sums_of_logits(logits)

    def value(self, statistics: RowStatistics) -> Tensor:
        alpha, noise, input_noise = (values.double() for values in (self.alpha, self.word_noise, self.input_noise))
        is_other = self.targets != self.inputs
        of_input = torch.where(is_other, input_noise, input_noise + alpha)
        scores, log_scores, num_ids = self._score_sums(statistics)
        of_target = is_other * (alpha * (statistics.chosen[0].double() + self.log_scale) + alpha)
        # Ids that are neither x nor z have the probability ``noise``, and x has alpha more.
        logarithms = (num_ids - is_other.double()) * torch.xlogy(noise, noise / of_input)
        logarithms = logarithms + is_other * (alpha + noise) * ((alpha + noise) / of_input).log()
        value = of_input * scores - noise * (log_scores + num_ids) - of_target + logarithms
        return value.to(statistics.total.dtype)

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        targets, alpha, is_other = self.targets[part], self.alpha[part], self.targets[part] != self.inputs[part]
        of_input = torch.where(is_other, self.input_noise[part], self.input_noise[part] + alpha)
        scale = gradient * of_input * (statistics.largest.double() + self.log_scale[part]).exp()
        is_finite = logits.isfinite()
        wide = logits.sub(statistics.largest[:, None]).exp_().mul_(scale.to(gradient.dtype)[:, None])
        wide.sub_(is_finite * (gradient * self.word_noise[part]).to(gradient.dtype)[:, None])
        here, columns = on_this_rank((targets - vocabulary.first_token)[None], logits)
        of_target = torch.where(here, -(gradient * alpha * is_other).to(gradient.dtype), 0.0)
        logits.copy_(wide.scatter_add_(1, columns.t(), of_target.t()))

    def _score_sums(self, statistics: RowStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the scores, the sum of their logarithms, and their number, float64 [m]."""
        below, num_ids = statistics.sums.double()
        raised = statistics.largest.double() + self.log_scale
        return statistics.total * raised.exp(), below + num_ids * raised, num_ids
