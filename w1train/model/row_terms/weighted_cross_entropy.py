"""The bound of masked noise whose rate differs from id to id.

Shapes: m = rows, k = rows of a chunk, v = vocabulary of this rank, w = vocabulary of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.kernels.cross_entropy import on_this_rank
from w1train.model.row_terms.row_term import RowStatistics, RowTerm, Vocabulary


@dataclass(slots=True, frozen=True)
class WeightedCrossEntropy(RowTerm):
    """lambda_x (-log p(x) - 1) + sum over v of lambda_v p(v) in nats, [m], at masked places: the density in t of the negative ELBO of
    masked noise with a schedule for each id, where lambda_v = -alpha'_v / (1 - alpha_v) at t (MD4, arXiv 2406.04329, section 6).

    If all rates are equal it is lambda times the cross-entropy. The rates come from a table with a number for each id. The table may
    require a gradient. On each rank this gradient is zero outside the rank's part of the vocabulary, so that the sum over the ranks that
    share the vocabulary is the gradient.
    """

    targets: Tensor
    """int64 [m]: x."""
    table: Tensor
    """float32 [w]: a number for each id of the whole vocabulary, such as a learned exponent or a share of entropy."""
    timesteps: Tensor
    """float32 or float64 [m]: t."""
    rates: Callable[[Tensor, Tensor], Tensor]
    """The function (numbers of the table [v], t [k, 1]) -> finite lambda [k, v], differentiable by the table. In GenMD4
    it is w / t, because alpha_v = 1 - t^w. It is compared by ==: a function of a module, or an object with __eq__."""

    @property
    def chosen_ids(self) -> Tensor:
        return self.targets[None]

    @property
    def num_sums(self) -> int:
        return 2

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        probabilities = statistics.probabilities(logits)
        rates = self._local_rates(self._local_table(logits, vocabulary), part).to(probabilities.dtype)
        here, columns = on_this_rank(self.targets[None, part] - vocabulary.first_token, logits)
        of_target = torch.where(here, rates.gather(1, columns.t()).t(), 0.0)
        return torch.cat([probabilities.mul_(rates).sum(dim=-1)[None], of_target])

    def value(self, statistics: RowStatistics) -> Tensor:
        mean_rate, of_target = statistics.sums
        return of_target * (_cross_entropy(statistics) - 1) + mean_rate

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        mean_rate, of_target = statistics.sums
        rates = self._local_rates(self._local_table(logits, vocabulary), part)
        factors = rates.add((of_target - mean_rate)[:, None]).mul_(gradient[:, None])
        wide = statistics.probabilities(logits).mul_(factors)
        logits.copy_(self._add_at_targets(wide, part, -gradient * of_target, vocabulary))

    def parameter_gradients(
        self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary
    ) -> tuple[Tensor, ...]:
        of_rates = statistics.probabilities(logits).mul_(gradient[:, None])
        of_rates = self._add_at_targets(of_rates, part, gradient * (_cross_entropy(statistics) - 1), vocabulary)
        with torch.enable_grad():
            local_table = self._local_table(logits, vocabulary).detach().requires_grad_()
            (of_local_table,) = torch.autograd.grad(self._local_rates(local_table, part), local_table, of_rates)
        result = torch.zeros_like(self.table)
        _local_part(result, logits, vocabulary).copy_(of_local_table)
        return (result,)

    def _local_rates(self, local_table: Tensor, part: slice) -> Tensor:
        """Return lambda of this rank's ids, [k, v]."""
        return self.rates(local_table, self.timesteps[part, None].to(local_table.dtype))

    def _local_table(self, logits: Tensor, vocabulary: Vocabulary) -> Tensor:
        return _local_part(self.table.detach(), logits, vocabulary)

    def _add_at_targets(self, wide: Tensor, part: slice, values: Tensor, vocabulary: Vocabulary) -> Tensor:
        here, columns = on_this_rank(self.targets[None, part] - vocabulary.first_token, wide)
        return wide.scatter_add_(1, columns.t(), torch.where(here, values, 0.0).t())


def _cross_entropy(statistics: RowStatistics) -> Tensor:
    return statistics.total.log() - (statistics.chosen[0] - statistics.largest)


def _local_part(table: Tensor, logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return this rank's part of a table, [v], a view."""
    return table[vocabulary.first_token : vocabulary.first_token + logits.shape[1]]
