"""The Triton kernels of cross_entropy.py: logits are read once in each direction, and their gradient is written over them.

Shapes: k = rows of a chunk, v = vocabulary of this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def row_statistics(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of [k, v]: largest, sum of exp(logit - largest), logit at ``columns`` (0 where that is outside), each float32 [k]."""
    num_rows, size = logits.shape
    largest, total, of_target = torch.empty((3, num_rows), dtype=torch.float32, device=logits.device).unbind()
    _row_statistics[(num_rows,)](logits, columns, largest, total, of_target, size, logits.stride(0), BLOCK=BLOCK, num_warps=8)
    return largest, total, of_target


def logits_to_gradient(logits: Tensor, columns: Tensor, largest: Tensor, scale: Tensor, gradient: Tensor) -> None:
    """In place: exp(logit - largest) * scale, less gradient where the column is the target."""
    num_rows, size = logits.shape
    grid = (num_rows, triton.cdiv(size, BLOCK))
    _logits_to_gradient[grid](logits, columns, largest, scale, gradient.contiguous(), size, logits.stride(0), BLOCK=BLOCK, num_warps=8)


@triton.jit
def _row_statistics(logits, targets, largest, total, of_target, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    summed = tl.zeros([BLOCK], dtype=tl.float32)
    # Each lane has a running maximum and sum of its own; one reduction at the end.
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, values)
        # A lane that has seen nothing but -inf would give inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp(best - base) + tl.exp(values - base)
        best = higher
    top = tl.max(best, axis=0)
    tl.store(largest + row, top)
    tl.store(total + row, tl.sum(summed * tl.exp(best - top), axis=0))
    target = tl.load(targets + row)
    here = (target >= 0) & (target < size)
    tl.store(of_target + row, tl.load(logits + row * stride + target, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _logits_to_gradient(logits, targets, largest, scale, gradient, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    outcome = tl.exp(values - tl.load(largest + row)) * tl.load(scale + row)
    outcome -= tl.where(columns == tl.load(targets + row), tl.load(gradient + row), 0.0)
    tl.store(logits + row * stride + columns, outcome.to(logits.dtype.element_ty), mask=inside)
