"""Output head and vocabulary-parallel cross-entropy together, a chunk of rows at a time.

The logits of a chunk exist in the run's precision while the chunk is worked on, and never all of them: a row keeps only its largest
logit and the sum of its exponentials for the backward pass, which computes the chunk's logits again (as in cut cross-entropy, arXiv
2411.09009; a third more FLOPs in the head) and turns them in place into their gradient.

Shapes: m = rows, k = rows of a chunk, h = hidden size, v = vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w1train.kernels.selection import Implementation, runs_triton


@dataclass(slots=True, frozen=True)
class Head:
    """How the head is split and computed."""

    chunk_size: int
    """Rows whose logits exist at once."""
    group: dist.ProcessGroup | None
    """Ranks that share the vocabulary; None = this one has all of it."""
    first_token: int
    """Vocabulary id of the rank's first row of the weight."""
    excluded_token: int | None
    """Taken out of the softmax; None = none is."""
    sum_row_gradients: bool
    """Add the gradients of the rows over the group; under sequence parallelism they stay partial sums, as whoever gathered the rows
    adds them up while scattering."""
    implementation: Implementation = "auto"


def linear_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Cross-entropy in nats, float32 [m], of softmax(rows weight^T) over the vocabulary of all ranks.

    Args:
        rows: [m, h], the same on all ranks of the group.
        weight: [v, h], this rank's part of the vocabulary. Under megatron-core's DistributedDataParallel its gradient is added
            to ``weight.main_grad`` chunk by chunk, in fp32.
        targets: int64 [m], ids in the whole vocabulary; none is the excluded token.
    """
    return _LinearCrossEntropy.apply(rows, weight, targets, head)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, head: Head) -> Tensor:
        largest, total = torch.empty((2, len(rows)), dtype=torch.float32, device=rows.device)
        of_target = torch.empty_like(total)
        for part in _parts(len(rows), head):
            found = _softmax_terms(_logits(rows[part], weight, head), targets[part] - head.first_token, head)
            largest[part], total[part], of_target[part] = found
        ctx.save_for_backward(rows, weight, targets, largest, total)
        ctx.head = head
        return total.log() - (of_target - largest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows, weight, targets, largest, total = ctx.saved_tensors
        head: Head = ctx.head
        grad_rows = torch.empty_like(rows)
        accumulator = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(len(rows), head):
            grad_logits = _logits(rows[part], weight, head)
            _to_gradient(grad_logits, targets[part] - head.first_token, largest[part], gradient[part] / total[part], gradient[part], head)
            torch.mm(grad_logits, weight, out=grad_rows[part])
            if accumulator is not None:
                accumulator.add(grad_logits, rows[part])
        if head.group is not None and head.sum_row_gradients:
            dist.all_reduce(grad_rows, group=head.group)
        return grad_rows, None if accumulator is None else accumulator.result(), None, None


def _parts(num_rows: int, head: Head) -> Iterator[slice]:
    return (slice(start, start + head.chunk_size) for start in range(0, num_rows, head.chunk_size))


def _logits(rows: Tensor, weight: Tensor, head: Head) -> Tensor:
    logits = rows @ weight.t()
    column = -1 if head.excluded_token is None else head.excluded_token - head.first_token
    if 0 <= column < len(weight):
        logits[:, column] = float("-inf")
    return logits


def _softmax_terms(logits: Tensor, columns: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Over the whole vocabulary, float32 [k]: largest logit, sum of exp(logit - largest), the target's logit. Apart, because their
    log-sum-exp, rounded, would be off by the same factor in every probability of a row.

    ``columns``: the target's place on this rank.
    """
    if runs_triton(logits, head.implementation):
        from w1train.kernels import triton_cross_entropy

        largest, total, of_target = triton_cross_entropy.row_statistics(logits, columns)
    else:
        largest, total, of_target = _row_statistics(logits, columns)
    if head.group is not None:
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=head.group)
        # One message for both sums.
        sums = torch.stack([total * torch.exp(own - largest), of_target])
        dist.all_reduce(sums, group=head.group)
        total, of_target = sums.unbind()
    return largest, total, of_target


def _row_statistics(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest), and the target's logit (0 where another rank has it)."""
    here = (columns >= 0) & (columns < logits.shape[-1])
    of_target = logits.gather(-1, torch.where(here, columns, 0)[:, None])[:, 0].float()
    largest = logits.amax(dim=-1).float()
    # In place, over fp32 logits too: they are computed for this alone.
    total = logits.float().sub_(largest[:, None]).exp_().sum(dim=-1)
    return largest, total, torch.where(here, of_target, 0.0)


def _to_gradient(logits: Tensor, columns: Tensor, largest: Tensor, scale: Tensor, gradient: Tensor, head: Head) -> None:
    """In place: exp(logit - largest) * scale, where scale = gradient / sum, less the row's gradient at the target."""
    if runs_triton(logits, head.implementation):
        from w1train.kernels import triton_cross_entropy

        triton_cross_entropy.logits_to_gradient(logits, columns, largest, scale, gradient)
        return
    wide = logits.float().sub_(largest[:, None]).exp_().mul_(scale[:, None])
    here = (columns >= 0) & (columns < logits.shape[-1])
    wide.scatter_add_(-1, torch.where(here, columns, 0)[:, None], torch.where(here, -gradient, 0.0)[:, None])
    logits.copy_(wide)


class _WeightGradient:
    """The sum over chunks of grad_logits^T rows: into megatron-core's fp32 ``main_grad`` where the weight has one, otherwise returned."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.has_main_grad = hasattr(weight, "grad_added_to_main_grad")
        self.total = weight.main_grad if self.has_main_grad else torch.zeros_like(weight, dtype=torch.float32)

    def add(self, grad_logits: Tensor, rows: Tensor) -> None:
        if rows.dtype == self.total.dtype:
            self.total.addmm_(grad_logits.t(), rows)
        elif rows.is_cuda:
            # bf16 factors, fp32 sum: one product at full speed, without rounding each chunk's to bf16.
            torch.addmm(self.total, grad_logits.t(), rows, out_dtype=self.total.dtype, out=self.total)
        else:
            self.total.addmm_(grad_logits.t().float(), rows.float())

    def result(self) -> Tensor:
        """What autograd gets. After main_grad it is a stand-in: the hook of megatron-core's wrapper wants a gradient to be there, and adds
        it where a tied embedding's own may be part of it (``zero_out_wgrad``), so there it is zero."""
        if not self.has_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        return torch.zeros_like(self.weight) if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like(self.weight)
