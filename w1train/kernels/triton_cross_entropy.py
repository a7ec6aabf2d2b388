"""The Triton kernels of cross_entropy.py: logits are read once in each direction, and their gradient is written over them.

Shapes: k = rows of a chunk, v = vocabulary of this rank, n = columns that are read in each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def row_statistics(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute w1train.kernels.cross_entropy.row_statistics."""
    num_rows, size = logits.shape
    largest, total = torch.empty((2, num_rows), dtype=torch.float32, device=logits.device).unbind()
    chosen = torch.empty(columns.shape, dtype=torch.float32, device=logits.device)
    _row_statistics[(num_rows,)](
        logits, columns.contiguous(), largest, total, chosen, len(columns), num_rows, size, logits.stride(0), BLOCK=BLOCK, num_warps=8
    )
    return largest, total, chosen


def write_gradient(logits: Tensor, columns: Tensor, largest: Tensor, scale: Tensor, gradients: Tensor) -> None:
    """Compute w1train.kernels.cross_entropy.write_gradient."""
    num_rows, size = logits.shape
    grid = (num_rows, triton.cdiv(size, BLOCK))
    columns, gradients = columns.contiguous(), gradients.contiguous()
    _write_gradient[grid](
        logits, columns, largest, scale, gradients, len(columns), num_rows, size, logits.stride(0), BLOCK=BLOCK, num_warps=8
    )


@triton.jit
def _row_statistics(logits, columns, largest, total, chosen, num_columns, num_rows, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    summed = tl.zeros([BLOCK], dtype=tl.float32)
    # Each lane has a running maximum and sum of its own, and one reduction at the end combines them.
    for start in range(0, size, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + lanes, mask=lanes < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, values)
        # A lane that has seen only -inf would compute inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp(best - base) + tl.exp(values - base)
        best = higher
    top = tl.max(best, axis=0)
    tl.store(largest + row, top)
    tl.store(total + row, tl.sum(summed * tl.exp(best - top), axis=0))
    for place in range(num_columns):
        column = tl.load(columns + place * num_rows + row)
        here = (column >= 0) & (column < size)
        tl.store(chosen + place * num_rows + row, tl.load(logits + row * stride + column, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _write_gradient(logits, columns, largest, scale, gradients, num_columns, num_rows, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < size
    values = tl.load(logits + row * stride + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    outcome = tl.exp(values - tl.load(largest + row)) * tl.load(scale + row)
    for place in range(num_columns):
        column = tl.load(columns + place * num_rows + row)
        outcome -= tl.where(lanes == column, tl.load(gradients + place * num_rows + row), 0.0)
    tl.store(logits + row * stride + lanes, outcome.to(logits.dtype.element_ty), mask=inside)
