"""The interface of a row term: its tokens, its sums over the vocabulary, its value and its gradient.

Shapes: m = rows, k = rows of a chunk, v = vocabulary of this rank, n = tokens that a term names in each row, s = sums of a term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

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


WHOLE_VOCABULARY = Vocabulary(group=None, first_token=0, excluded_token=None, implementation="torch")


@dataclass(slots=True, frozen=True)
class RowStatistics:
    """Numbers that a term needs of k rows besides their logits, over the vocabulary of all ranks: float32, except in ``value_of``."""

    largest: Tensor
    """[k]: largest logit, of the ids that the term does not remove."""
    total: Tensor
    """[k]: sum of exp(logit - largest), over the same ids. It stays apart from ``largest``, because their log-sum-exp, rounded to fp32,
    would be off by the same factor in every probability of a row."""
    chosen: Tensor
    """[n, k]: logits of the tokens that the term names, removed or not."""
    sums: Tensor
    """[s, k]: the term's sums over the vocabulary."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits [k, v], float32."""
        return logits.sub(self.largest[:, None]).exp_().div_(self.total[:, None])

    def sums_of_logits(self, logits: Tensor) -> Tensor:
        """Return the sum of logit - largest over the ids whose logit is finite, and the number of these ids, float32 [2, k]."""
        is_finite = logits.isfinite()
        below = logits.sub(self.largest[:, None]).masked_fill_(~is_finite, 0.0)
        return torch.stack([below.sum(dim=-1), is_finite.sum(dim=-1).to(below.dtype)])


@dataclass(slots=True, frozen=True)
class RowTerm(ABC):
    """A differentiable number of each row of logits, or several numbers. Each subclass is a dataclass."""

    def is_same(self, other: RowTerm) -> bool:
        """Tell whether both are of one class and have the same tensor objects. Values of tensors are not compared, because the comparison
        would wait for a GPU."""
        names = [entry.name for entry in fields(self)]
        return type(self) is type(other) and all(_is_same(getattr(self, name), getattr(other, name)) for name in names)

    @property
    def chosen_ids(self) -> Tensor | None:
        """Return the tokens whose logits the term reads, int64 [n, m]; None = the term does not read the logits of particular tokens."""
        return None

    @property
    def removed_ids(self) -> Tensor | None:
        """Return the token of each row that the term's statistics and sums leave out, int64 [m]; None = they leave no token out.

        The term adds the token itself, from its logit. What remains of a sum after a subtraction would be rounding where this token has
        nearly all of the probability.
        """
        return None

    @property
    def num_sums(self) -> int:
        """Return how many sums over the vocabulary the term needs besides the softmax's own."""
        return 0

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Return the tensors besides the logits for which the term has a gradient."""
        return ()

    def local_sums(self, logits: Tensor, part: slice, statistics: RowStatistics, vocabulary: Vocabulary) -> Tensor:
        """Return the term's sums over this rank's vocabulary, float32 [s, k], from logits [k, v], -inf at the removed ids.

        Args:
            part: the places of these rows among all rows, with which the term finds its own values for each row.
            statistics: the statistics of these rows, whose sums are not known yet.
        """
        raise NotImplementedError

    @abstractmethod
    def value(self, statistics: RowStatistics) -> Tensor:
        """Return the term, [m] or [m, n], in the precision of the statistics of all rows."""

    @abstractmethod
    def write_gradient(self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
        """Write the gradient of the sum of gradient * value over the logits [k, v], which are -inf at the removed ids.

        Args:
            part: as in ``local_sums``.
            statistics, gradient: the values of these rows.
        """

    def parameter_gradients(
        self, logits: Tensor, part: slice, statistics: RowStatistics, gradient: Tensor, vocabulary: Vocabulary
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the sum of gradient * value for each of ``parameters``, from the same arguments as ``write_gradient``.

        It is what this rank's part of the vocabulary contributes: the caller adds it up over the ranks that share the vocabulary.
        """
        return ()


def _is_same(value: object, other: object) -> bool:
    return value is other if isinstance(value, Tensor) or isinstance(other, Tensor) else value == other


def remove(logits: Tensor, ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Write -inf over the logits [k, v] at one id of each row, where this rank has it, and return what was there, [k, 1], for
    ``restore``."""
    columns, here = _columns(logits, ids, vocabulary)
    before = logits.gather(1, columns)
    logits.scatter_(1, columns, before.masked_fill(here, float("-inf")))
    return before


def restore(logits: Tensor, ids: Tensor, vocabulary: Vocabulary, before: Tensor) -> None:
    """Undo ``remove``."""
    logits.scatter_(1, _columns(logits, ids, vocabulary)[0], before)


def _columns(logits: Tensor, ids: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Return the columns of ids [k], with 0 for those of other ranks, and which are here, both [k, 1]."""
    columns = (ids - vocabulary.first_token)[:, None]
    here = (columns >= 0) & (columns < logits.shape[1])
    return torch.where(here, columns, 0), here


def value_of(term: RowTerm, logits: Tensor) -> Tensor:
    """Return a term of whole rows of logits [m, v], in the precision of the logits. The caller takes tokens out of the softmax."""
    return term.value(statistics_of(term, logits)[1])


def statistics_of(term: RowTerm, logits: Tensor) -> tuple[Tensor, RowStatistics]:
    """Return whole rows of logits [m, v] without the ids that a term removes, and the term's statistics in their precision."""
    nothing = logits.new_empty((0, len(logits)))
    chosen = nothing if term.chosen_ids is None else logits.gather(1, term.chosen_ids.t()).t()
    if term.removed_ids is not None:
        logits = logits.clone()
        remove(logits, term.removed_ids, WHOLE_VOCABULARY)
    largest = logits.amax(dim=-1)
    total = logits.sub(largest[:, None]).exp_().sum(dim=-1)
    statistics = RowStatistics(largest, total, chosen, nothing)
    if term.num_sums:
        statistics = replace(statistics, sums=term.local_sums(logits, slice(None), statistics, WHOLE_VOCABULARY))
    return logits, statistics
