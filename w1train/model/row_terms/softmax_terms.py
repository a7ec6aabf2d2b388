"""Terms of the softmax of a row alone.

Shapes: m = rows, k = rows of a chunk, v = vocabulary of this rank, n = tokens that a term names in each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.kernels import cross_entropy
from w1train.model.row_terms.row_term import RowStatistics, RowTerm, Vocabulary


@dataclass(slots=True, frozen=True)
class CrossEntropy(RowTerm):
    """-log p(target) in nats, [m]."""

    targets: Tensor
    """int64 [m]: ids in the whole vocabulary without the excluded token."""

    @property
    def chosen_ids(self) -> Tensor:
        return self.targets[None]

    def value(self, statistics: RowStatistics) -> Tensor:
        return statistics.total.log() - (statistics.chosen[0] - statistics.largest)

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        columns, scale = self.chosen_ids[:, part] - vocabulary.first_token, gradient / statistics.total
        cross_entropy.write_gradient(logits, columns, statistics.largest, scale, gradient[None], vocabulary.implementation)


@dataclass(slots=True, frozen=True)
class LogProbabilities(RowTerm):
    """log p(id) in nats of n ids in each row, [m, n]."""

    ids: Tensor
    """int64 [m, n]: ids in the whole vocabulary. The excluded token's value is -inf, and no gradient may be asked of it."""

    @property
    def chosen_ids(self) -> Tensor:
        return self.ids.t()

    def value(self, statistics: RowStatistics) -> Tensor:
        return (statistics.chosen - statistics.largest - statistics.total.log()).t()

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        columns, scale = self.chosen_ids[:, part] - vocabulary.first_token, -gradient.sum(dim=1) / statistics.total
        cross_entropy.write_gradient(logits, columns, statistics.largest, scale, -gradient.t(), vocabulary.implementation)


@dataclass(slots=True, frozen=True)
class Entropy(RowTerm):
    """-sum of p log p over the vocabulary in nats, [m], with p = softmax(logits / temperature)."""

    temperature: float = 1.0

    @property
    def num_sums(self) -> int:
        return 2

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        exponentials = self._exponentials(logits, statistics)
        return torch.stack([exponentials.sum(dim=-1), torch.special.entr(exponentials).sum(dim=-1)])

    def value(self, statistics: RowStatistics) -> Tensor:
        # No exponential is above 1, so that no part is negative and nothing cancels.
        total, along = statistics.sums
        return total.log() + along / total

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        # The derivative by a logit is -p (log p + entropy) / temperature.
        probabilities = self._exponentials(logits, statistics).div_(statistics.sums[0][:, None])
        along = torch.special.entr(probabilities).sub_(probabilities.mul_(self.value(statistics)[:, None]))
        logits.copy_(along.mul_((gradient / self.temperature)[:, None]))

    def _exponentials(self, logits: Tensor, statistics: RowStatistics) -> Tensor:
        """Return exp((logit - largest) / temperature), float32 [k, v]; an id whose logit is -inf has 0."""
        return logits.sub(statistics.largest[:, None]).div_(self.temperature).exp_()


@dataclass(slots=True, frozen=True)
class IsMostProbable(RowTerm):
    """1 where no id of the softmax is more probable than the target, otherwise 0, [m]: a condition, which has no gradient.

    A target that shares the first place counts as most probable. Which of the ids comes first in the vocabulary therefore does not matter,
    and the condition is the same however ranks share the vocabulary. In bf16 equal logits are frequent.
    """

    targets: Tensor
    """int64 [m]: ids in the whole vocabulary. The excluded token is never most probable."""

    @property
    def chosen_ids(self) -> Tensor:
        return self.targets[None]

    def value(self, statistics: RowStatistics) -> Tensor:
        return (statistics.chosen[0] == statistics.largest).to(statistics.total.dtype)

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        raise AssertionError("a condition has no gradient: the loss must take its value without one")


@dataclass(slots=True, frozen=True)
class MeanLogProbability(RowTerm):
    """The mean of log p(v) in nats over all ids v of the softmax, [m]. Label smoothing by e replaces -log p(target) by (1 - e) times itself
    minus e times this mean (Szegedy et al., arXiv 1512.00567, section 7). Ids whose logit is -inf, such as the excluded token, are no part
    of the mean."""

    @property
    def num_sums(self) -> int:
        return 2

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        return statistics.sums_of_logits(logits)

    def value(self, statistics: RowStatistics) -> Tensor:
        below, num_ids = statistics.sums
        return below / num_ids - statistics.total.log()

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        is_finite, share = logits.isfinite(), gradient / statistics.sums[1]
        logits.copy_(statistics.probabilities(logits).mul_(-gradient[:, None]).add_(is_finite * share[:, None]))


@dataclass(slots=True, frozen=True)
class Reconstruction(RowTerm):
    """-log p(target | z) in nats, [m], under the full posterior of a model whose logits are the leave-one-out posterior, which does not
    know the id z at the place itself: the end term of the bound at the smallest t, and the cross-entropy of the full posterior at any t.

    The full posterior's logits are the leave-one-out logits, plus log(1 + alpha_t / c_t(z)) at z (arXiv 2605.22765). Where no softmax has z
    (a mask), both are the same, and this is the cross-entropy. A model that predicts the full posterior needs ``CrossEntropy`` alone.
    """

    targets: Tensor
    """int64 [m]: ids in the whole vocabulary without the excluded token."""
    inputs: Tensor
    """int64 [m]: the id z that the model saw in the place of each target."""
    observed: Tensor
    """float32 or float64 [m]: log(1 + alpha_t / c_t(z)), finite."""

    @property
    def chosen_ids(self) -> Tensor:
        return torch.stack([self.targets, self.inputs])

    def value(self, statistics: RowStatistics) -> Tensor:
        of_target, _ = statistics.chosen.double() - statistics.largest
        raised = torch.where(self.targets == self.inputs, self.observed, 0.0)
        total, _ = self._total(statistics, slice(None))
        return (total.log() - of_target - raised).to(statistics.total.dtype)

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        total, extra = self._total(statistics, part)
        columns = torch.stack([self.targets[part], self.inputs[part]]) - vocabulary.first_token
        gradients = torch.stack([gradient, (-gradient * extra / total).to(gradient.dtype)])
        scale = (gradient / total).to(gradient.dtype)
        cross_entropy.write_gradient(logits, columns, statistics.largest, scale, gradients, vocabulary.implementation)

    def _total(self, statistics: RowStatistics, part: slice) -> tuple[Tensor, Tensor]:
        """Return the full posterior's sum of exponentials, and the part of it that ``observed`` adds, both float64 [k]."""
        of_input = statistics.chosen[1].double() - statistics.largest
        extra = of_input.exp() * self.observed[part].double().expm1()
        return statistics.total + extra, extra
