"""The numbers that a loss, a likelihood or a sampler may ask of each row of logits: a closed list, one class for each.

Training never holds the logits of all rows over the whole vocabulary. The output head computes a chunk of rows at a time, and all terms
that are asked for in one pass (w1train/model/chunked_head.py); each term writes the gradient of its own value over the chunk's logits.
Evaluation and sampling already have the logits of all rows, and compute a term of them with ``value_of``.
To add a term, write one class here; a Triton kernel for it goes into w1train/kernels.

Shapes: m = rows, k = rows of a chunk, v = vocabulary of this rank, n = tokens that a term names in each row, s = sums of a term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.kernels import cross_entropy
from w1train.kernels.selection import Implementation


@dataclass(slots=True, frozen=True)
class Vocabulary:
    """The part of the vocabulary whose logits this rank computes."""

    group: dist.ProcessGroup | None
    """Ranks that share the vocabulary; None = this rank has all of it."""
    first_token: int
    """Id of the first token of this rank's part."""
    excluded_token: int | None
    """Id of the token that is taken out of the softmax; None = every token is in it."""
    implementation: Implementation = "auto"
    """The library that computes what is read from the logits: Triton, torch, or the better of them ("auto")."""


@dataclass(slots=True, frozen=True)
class RowStatistics:
    """Numbers that a term needs of k rows besides their logits, over the vocabulary of all ranks: float32, except in ``value_of``."""

    largest: Tensor
    """[k]: largest logit."""
    total: Tensor
    """[k]: sum of exp(logit - largest). It stays apart from ``largest``, because their log-sum-exp, rounded to fp32, would be off by the
    same factor in every probability of a row."""
    chosen: Tensor
    """[n, k]: logits of the tokens that the term names."""
    sums: Tensor
    """[s, k]: the term's sums over the vocabulary."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits [k, v], float32."""
        return logits.sub(self.largest[:, None]).exp_().div_(self.total[:, None])


@dataclass(slots=True, frozen=True)
class RowTerm(ABC):
    """A differentiable number of each row of logits, or several numbers. Each subclass is a dataclass."""

    def is_same(self, other: RowTerm) -> bool:
        """Tell whether both are of one class and have the same tensor objects. Values are not compared, because the comparison would wait
        for a GPU."""
        names = [entry.name for entry in fields(self)]
        return type(self) is type(other) and all(getattr(self, name) is getattr(other, name) for name in names)

    @property
    def chosen_ids(self) -> Tensor | None:
        """Return the tokens whose logits the term reads, int64 [n, m]; None = the term does not read the logits of particular tokens."""
        return None

    @property
    def num_sums(self) -> int:
        """Return how many sums over the vocabulary the term needs besides the softmax's own."""
        return 0

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics) -> Tensor:
        """Return the term's sums over this rank's vocabulary, float32 [s, k], from logits [k, v].

        Args:
            part: the places of these rows among all rows, with which the term finds its own values for each row.
            statistics: the statistics of these rows, whose sums are not known yet.
        """
        raise NotImplementedError

    @abstractmethod
    def value(self, statistics: RowStatistics) -> Tensor:
        """Return the term, [k] or [k, n], in the precision of the statistics."""

    @abstractmethod
    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        """Write the gradient of the sum of gradient * value over the logits [k, v].

        Args:
            part: as in ``local_sums``.
            statistics, gradient: the values of these rows.
        """


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
    """-sum of p log p over the vocabulary in nats, [m]."""

    @property
    def num_sums(self) -> int:
        return 1

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics) -> Tensor:
        return torch.special.entr(statistics.probabilities(logits)).sum(dim=-1)[None]

    def value(self, statistics: RowStatistics) -> Tensor:
        return statistics.sums[0].clone()

    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        # The derivative by a logit is -p (log p + entropy).
        probabilities = statistics.probabilities(logits)
        along = torch.special.entr(probabilities).sub_(probabilities.mul_(statistics.sums[0][:, None]))
        logits.copy_(along.mul_(gradient[:, None]))


def value_of(term: RowTerm, logits: Tensor) -> Tensor:
    """Return a term of whole rows of logits [m, v], in the precision of the logits. The caller takes tokens out of the softmax."""
    largest, nothing = logits.amax(dim=-1), logits.new_empty((0, len(logits)))
    total = logits.sub(largest[:, None]).exp_().sum(dim=-1)
    chosen = nothing if term.chosen_ids is None else logits.gather(1, term.chosen_ids.t()).t()
    statistics = RowStatistics(largest, total, chosen, nothing)
    if term.num_sums:
        statistics = replace(statistics, sums=term.local_sums(logits, slice(None), statistics))
    return term.value(statistics)
