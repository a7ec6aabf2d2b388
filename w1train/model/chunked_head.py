"""Output head and row terms together, a chunk of rows at a time, over a vocabulary that tensor-parallel ranks share.

Only the logits of one chunk exist at a time, in the run's precision. A few numbers of each row are kept for the backward pass. It computes
the chunk's logits again, which costs a third more FLOPs in the head (as in cut cross-entropy, arXiv 2411.09009), and writes their gradient
over them.

For each chunk, the ranks that share the vocabulary exchange the largest logits; then the sums of exponentials, with the logits of the
tokens that the terms name; then the other sums of the terms, if there are any. The backward pass exchanges the rows' gradients once.

Shapes: m = rows, k = rows of a chunk, h = hidden size, v = vocabulary of this rank, n = tokens that all terms name in each row,
r = softmaxes of a row (of all its logits, and of a term that removes a logit), f = numbers that are kept of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.kernels.cross_entropy import row_statistics
from w1train.model.row_terms import RowStatistics, RowTerm, Vocabulary
from w1train.model.row_terms.row_term import remove, restore


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
    parameters = [parameter for term in terms for parameter in term.parameters]
    return _LinearRowTerms.apply(rows, weight, terms, head, *parameters)


class _LinearRowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, terms: Sequence[RowTerm], head: Head, *parameters: Tensor) -> tuple[Tensor, ...]:
        layout = _layout(terms, rows)
        kept = torch.empty((sum(layout.sizes), len(rows)), dtype=torch.float32, device=rows.device)
        for part in _parts(len(rows), head):
            kept[:, part] = _statistics(_logits(rows[part], weight, head.vocabulary), part, layout, head.vocabulary)
        ctx.save_for_backward(rows, weight, kept)
        ctx.layout, ctx.head = layout, head
        # A term that is only logged has no gradient: nothing is computed for it.
        ctx.set_materialize_grads(False)
        return tuple(term.value(own) for term, own in zip(terms, layout.by_term(kept), strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, kept = ctx.saved_tensors
        head: Head = ctx.head
        layout: _Layout = ctx.layout
        grad_rows = torch.empty_like(rows)
        accumulator = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        of_parameters = _ParameterGradients(any(ctx.needs_input_grad[_FIRST_PARAMETER:]))
        for part in _parts(len(rows), head):
            grad_logits = _logits(rows[part], weight, head.vocabulary)
            asked = _asked(layout, part, kept, gradients)
            of_parameters.add(grad_logits, part, asked, head.vocabulary)
            _to_gradient(grad_logits, part, asked, head.vocabulary)
            torch.mm(grad_logits, weight, out=grad_rows[part])
            if accumulator is not None:
                accumulator.add(grad_logits, rows[part])
        if head.vocabulary.group is not None and head.sum_row_gradients:
            dist.all_reduce(grad_rows, group=head.vocabulary.group)
        of_weight = None if accumulator is None else accumulator.result()
        return grad_rows, of_weight, None, None, *of_parameters.result(layout.terms)


_FIRST_PARAMETER = 4
"""The place of the first parameter of a term among the arguments of ``_LinearRowTerms.forward``."""


@dataclass(slots=True, frozen=True)
class _Layout:
    """The places of the numbers that are kept of each row for some terms: largest logits [r], sums of exponentials [r], logits of the
    tokens that the terms name [n], and the terms' sums."""

    terms: Sequence[RowTerm]
    ids: Tensor
    """int64 [n, m]: the tokens that all terms name."""
    num_chosen: list[int]
    """Tokens that each term names."""

    @property
    def removing(self) -> list[RowTerm]:
        """Terms with a softmax of their own, because they remove a logit of each row."""
        return [term for term in self.terms if term.removed_ids is not None]

    @property
    def sizes(self) -> list[int]:
        num_softmaxes = 1 + len(self.removing)
        return [num_softmaxes, num_softmaxes, sum(self.num_chosen), sum(term.num_sums for term in self.terms)]

    def by_term(self, kept: Tensor) -> list[RowStatistics]:
        """Return views of [f, k] for each term."""
        largest, totals, chosen, sums = kept.split(self.sizes)
        own_softmax = count(1)
        softmaxes = [0 if term.removed_ids is None else next(own_softmax) for term in self.terms]
        own = zip(softmaxes, chosen.split(self.num_chosen), sums.split([term.num_sums for term in self.terms]), strict=True)
        return [RowStatistics(largest[place], totals[place], own_chosen, own_sums) for place, own_chosen, own_sums in own]


def _layout(terms: Sequence[RowTerm], rows: Tensor) -> _Layout:
    nothing = torch.empty((0, len(rows)), dtype=torch.int64, device=rows.device)
    chosen = [nothing if term.chosen_ids is None else term.chosen_ids for term in terms]
    return _Layout(terms, torch.cat([nothing, *chosen]), [len(ids) for ids in chosen])


def _parts(num_rows: int, head: Head) -> Iterator[slice]:
    return (slice(start, start + head.chunk_size) for start in range(0, num_rows, head.chunk_size))


def _logits(rows: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return this rank's logits [k, v] of rows [k, h], -inf at the excluded token."""
    logits = rows @ weight.t()
    column = -1 if vocabulary.excluded_token is None else vocabulary.excluded_token - vocabulary.first_token
    if 0 <= column < len(weight):
        logits[:, column] = float("-inf")
    return logits


def _statistics(logits: Tensor, part: slice, layout: _Layout, vocabulary: Vocabulary) -> Tensor:
    """Return what is kept of rows ``part``, from their logits [k, v], float32 [f, k]."""
    kept = logits.new_empty((sum(layout.sizes), len(logits)), dtype=torch.float32)
    # These are views, so that what is written into them is kept. One message carries the sums of exponentials and the chosen logits.
    num_softmaxes, _, num_chosen, num_sums = layout.sizes
    largest, softmax_sums, term_sums = kept.split([num_softmaxes, num_softmaxes + num_chosen, num_sums])
    totals, columns = softmax_sums[:num_softmaxes], layout.ids[:, part] - vocabulary.first_token
    largest[0], totals[0], softmax_sums[num_softmaxes:] = row_statistics(logits, columns, vocabulary.implementation)
    for place, term in enumerate(layout.removing, start=1):
        with _removed(logits, term, part, vocabulary):
            largest[place], totals[place], _ = row_statistics(logits, columns[:0], vocabulary.implementation)
    if vocabulary.group is not None:
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=vocabulary.group)
        totals *= torch.exp(own - largest)
        dist.all_reduce(softmax_sums, group=vocabulary.group)
    for term, own_statistics in zip(layout.terms, layout.by_term(kept), strict=True):
        if term.num_sums:
            with _removed(logits, term, part, vocabulary):
                own_statistics.sums[:] = term.local_sums(logits, part, own_statistics, vocabulary)
    if vocabulary.group is not None and len(term_sums):
        dist.all_reduce(term_sums, group=vocabulary.group)
    return kept


@contextmanager
def _removed(logits: Tensor, term: RowTerm, part: slice, vocabulary: Vocabulary) -> Iterator[None]:
    """Take the logits that a term removes out of rows ``part`` for as long as the context lasts."""
    if term.removed_ids is None:
        yield
        return
    ids = term.removed_ids[part]
    before = remove(logits, ids, vocabulary)
    yield
    restore(logits, ids, vocabulary, before)


type _Asked = list[tuple[RowTerm, RowStatistics, Tensor]]
"""The terms of which a gradient is asked, each with the statistics and the gradient of some rows."""


def _asked(layout: _Layout, part: slice, kept: Tensor, gradients: Sequence[Tensor | None]) -> _Asked:
    by_term = zip(layout.terms, layout.by_term(kept[:, part]), gradients, strict=True)
    return [(term, own, gradient[part]) for term, own, gradient in by_term if gradient is not None]


def _to_gradient(logits: Tensor, part: slice, asked: _Asked, vocabulary: Vocabulary) -> None:
    """Write the sum of the terms' gradients over the logits of rows ``part``.

    A single gradient is written in place. Several gradients are computed on fp32 copies of the logits, and their sum is rounded once.
    """
    if len(asked) == 1:
        _write_gradient(logits, part, *asked[0], vocabulary)
        return
    total = torch.zeros_like(logits, dtype=torch.float32)
    for term, own, gradient in asked:
        wide = logits.to(torch.float32, copy=True)
        _write_gradient(wide, part, term, own, gradient, vocabulary)
        total += wide
    logits.copy_(total)


def _write_gradient(logits: Tensor, part: slice, term: RowTerm, own: RowStatistics, gradient: Tensor, vocabulary: Vocabulary) -> None:
    if term.removed_ids is not None:
        remove(logits, term.removed_ids[part], vocabulary)
    term.write_gradient(logits, part, own, gradient, vocabulary)


class _ParameterGradients:
    """The sums over chunks of the gradients of the terms' parameters."""

    def __init__(self, are_needed: bool) -> None:
        self.are_needed = are_needed
        self.totals: dict[int, tuple[Tensor, ...]] = {}
        """By the ``id`` of the term."""

    def add(self, logits: Tensor, part: slice, asked: _Asked, vocabulary: Vocabulary) -> None:
        for term, own, gradient in asked if self.are_needed else ():
            found = term.parameter_gradients(logits, part, own, gradient, vocabulary)
            before = self.totals.get(id(term))
            self.totals[id(term)] = found if before is None else tuple(map(torch.add, before, found))

    def result(self, terms: Sequence[RowTerm]) -> list[Tensor | None]:
        """Return what autograd gets for each parameter of each term."""
        return [gradient for term in terms for gradient in self.totals.get(id(term), (None,) * len(term.parameters))]


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
