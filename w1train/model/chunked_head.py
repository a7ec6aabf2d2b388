"""Output head and row terms together, a chunk of rows at a time, over a vocabulary that tensor-parallel ranks share.

Only the logits of one chunk exist at a time, in the run's precision. A few numbers of each row are kept for the backward pass. It computes
the chunk's logits again, which costs a third more FLOPs in the head (as in cut cross-entropy, arXiv 2411.09009), and writes their gradient
over them.

For each chunk, the ranks that share the vocabulary exchange the largest logits; then the sums of exponentials, with the logits of the
tokens that the terms name; then the other sums of the terms, if there are any. The backward pass exchanges the rows' gradients once.

Shapes: m = rows, k = rows of a chunk, h = hidden size, v = vocabulary of this rank, n = tokens that all terms name in each row,
f = numbers that are kept of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.kernels.cross_entropy import row_statistics
from w1train.model.row_terms import RowStatistics, RowTerm, Vocabulary


@dataclass(slots=True, frozen=True)
class Head:
    """The split of the head over ranks and chunks, and the implementation that computes it."""

    vocabulary: Vocabulary
    chunk_size: int
    """Rows whose logits exist at once."""
    sum_row_gradients: bool
    """True: the gradients of the rows are added up over the ranks that share the vocabulary. It is False under sequence parallelism: there
    they stay partial sums, because the backward pass of the gather that made the rows adds them up while it scatters them."""


def linear_row_terms(rows: Tensor, weight: Tensor, terms: Sequence[RowTerm], head: Head) -> tuple[Tensor, ...]:
    """Return the value of each term of the logits rows weight^T, over the vocabulary of all ranks.

    Args:
        rows: [m, h], the same on all ranks that share the vocabulary.
        weight: [v, h], this rank's part of the vocabulary. Under megatron-core's DistributedDataParallel its gradient is added
            to ``weight.main_grad`` chunk by chunk, in fp32.
    """
    return _LinearRowTerms.apply(rows, weight, terms, head)


class _LinearRowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, terms: Sequence[RowTerm], head: Head) -> tuple[Tensor, ...]:
        ids = _chosen_ids(terms, rows)
        kept = torch.empty((_num_kept(ids, terms), len(rows)), dtype=torch.float32, device=rows.device)
        for part in _parts(len(rows), head):
            kept[:, part] = _statistics(_logits(rows[part], weight, head.vocabulary), part, ids, terms, head.vocabulary)
        ctx.save_for_backward(rows, weight, kept)
        ctx.terms, ctx.head = terms, head
        # A term that is only logged has no gradient: nothing is computed for it.
        ctx.set_materialize_grads(False)
        return tuple(term.value(own) for term, own in zip(terms, _by_term(kept, terms), strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor | None, None, None]:
        rows, weight, kept = ctx.saved_tensors
        head: Head = ctx.head
        grad_rows = torch.empty_like(rows)
        accumulator = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(len(rows), head):
            grad_logits = _logits(rows[part], weight, head.vocabulary)
            _to_gradient(grad_logits, part, ctx.terms, _by_term(kept[:, part], ctx.terms), gradients, head.vocabulary)
            torch.mm(grad_logits, weight, out=grad_rows[part])
            if accumulator is not None:
                accumulator.add(grad_logits, rows[part])
        if head.vocabulary.group is not None and head.sum_row_gradients:
            dist.all_reduce(grad_rows, group=head.vocabulary.group)
        return grad_rows, None if accumulator is None else accumulator.result(), None, None


def _parts(num_rows: int, head: Head) -> Iterator[slice]:
    return (slice(start, start + head.chunk_size) for start in range(0, num_rows, head.chunk_size))


def _chosen_ids(terms: Sequence[RowTerm], rows: Tensor) -> Tensor:
    """Return the tokens that all terms name, int64 [n, m]."""
    nothing = torch.empty((0, len(rows)), dtype=torch.int64, device=rows.device)
    return torch.cat([nothing, *(term.chosen_ids for term in terms if term.chosen_ids is not None)])


def _logits(rows: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return this rank's logits [k, v] of rows [k, h], -inf at the excluded token."""
    logits = rows @ weight.t()
    column = -1 if vocabulary.excluded_token is None else vocabulary.excluded_token - vocabulary.first_token
    if 0 <= column < len(weight):
        logits[:, column] = float("-inf")
    return logits


def _num_kept(ids: Tensor, terms: Sequence[RowTerm]) -> int:
    return 2 + len(ids) + sum(term.num_sums for term in terms)


def _statistics(logits: Tensor, part: slice, ids: Tensor, terms: Sequence[RowTerm], vocabulary: Vocabulary) -> Tensor:
    """Return what is kept of rows ``part``, from their logits [k, v], float32 [f, k]: the two numbers of the softmax, the logits of
    their ids, and the sums of the terms."""
    kept = logits.new_empty((_num_kept(ids, terms), len(logits)), dtype=torch.float32)
    # These are views, so that what is written into them is kept. One message carries the sum of exponentials and the chosen logits.
    largest, softmax_sums, term_sums = kept[0], kept[1 : 2 + len(ids)], kept[2 + len(ids) :]
    columns = ids[:, part] - vocabulary.first_token
    largest[:], softmax_sums[0], softmax_sums[1:] = row_statistics(logits, columns, vocabulary.implementation)
    if vocabulary.group is not None:
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=vocabulary.group)
        softmax_sums[0] *= torch.exp(own - largest)
        dist.all_reduce(softmax_sums, group=vocabulary.group)
    for term, own_statistics in zip(terms, _by_term(kept, terms), strict=True):
        if term.num_sums:
            own_statistics.sums[:] = term.local_sums(logits, part, own_statistics)
    if vocabulary.group is not None and len(term_sums):
        dist.all_reduce(term_sums, group=vocabulary.group)
    return kept


def _by_term(kept: Tensor, terms: Sequence[RowTerm]) -> list[RowStatistics]:
    """Return views of [f, k] for each term."""
    num_chosen = [0 if term.chosen_ids is None else len(term.chosen_ids) for term in terms]
    num_sums = [term.num_sums for term in terms]
    softmax, chosen, sums = kept.split([2, sum(num_chosen), sum(num_sums)])
    return [
        RowStatistics(softmax[0], softmax[1], own_chosen, own_sums)
        for own_chosen, own_sums in zip(chosen.split(num_chosen), sums.split(num_sums), strict=True)
    ]


def _to_gradient(
    logits: Tensor,
    part: slice,
    terms: Sequence[RowTerm],
    statistics: Sequence[RowStatistics],
    gradients: Sequence[Tensor | None],
    vocabulary: Vocabulary,
) -> None:
    """Write the sum of the terms' gradients over the logits of rows ``part``.

    A single gradient is written in place. Several gradients are computed on fp32 copies of the logits, and their sum is rounded once.
    """
    asked = [(term, own, gradient[part]) for term, own, gradient in zip(terms, statistics, gradients, strict=True) if gradient is not None]
    if len(asked) == 1:
        term, own, gradient = asked[0]
        term.write_gradient(logits, part, own, gradient, vocabulary)
        return
    total = torch.zeros_like(logits, dtype=torch.float32)
    for term, own, gradient in asked:
        wide = logits.to(torch.float32, copy=True)
        term.write_gradient(wide, part, own, gradient, vocabulary)
        total += wide
    logits.copy_(total)


class _WeightGradient:
    """The sum over chunks of grad_logits^T rows, in megatron-core's fp32 ``main_grad`` where the weight has one."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.has_main_grad = hasattr(weight, "grad_added_to_main_grad")
        self.total = weight.main_grad if self.has_main_grad else torch.zeros_like(weight, dtype=torch.float32)

    def add(self, grad_logits: Tensor, rows: Tensor) -> None:
        if rows.dtype == self.total.dtype:
            self.total.addmm_(grad_logits.t(), rows)
        elif rows.is_cuda:
            # The factors are bf16 and the sum is fp32: one product runs at full speed, and the product of a chunk is not rounded to bf16.
            torch.addmm(self.total, grad_logits.t(), rows, out_dtype=self.total.dtype, out=self.total)
        else:
            self.total.addmm_(grad_logits.t().float(), rows.float())

    def result(self) -> Tensor:
        """Return what autograd gets. After main_grad this is a stand-in, because the hook of megatron-core's wrapper wants a gradient to be
        there. Where a tied embedding adds its own gradient to it (``zero_out_wgrad``), the hook uses the sum, so the stand-in is zero."""
        if not self.has_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        return torch.zeros_like(self.weight) if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like(self.weight)
