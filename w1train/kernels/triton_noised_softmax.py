"""The Triton kernels of noised_softmax.py: logits are read once in each direction, and their gradient is written over them.

Shapes: k = rows of a chunk, v = vocabulary of this rank, n = columns that have a gradient of their own in each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def noised_sums(logits: Tensor, largest: Tensor, scale: Tensor, ratio: Tensor) -> Tensor:
    """Compute w1train.kernels.noised_softmax.noised_sums."""
    num_rows, size = logits.shape
    sums = torch.empty((2, num_rows), dtype=torch.float32, device=logits.device)
    rows = (largest.contiguous(), scale.contiguous(), ratio.contiguous())
    _noised_sums[(num_rows,)](logits, *rows, sums, num_rows, size, logits.stride(0), BLOCK=BLOCK, num_warps=8)
    return sums


def write_gradient(
    logits: Tensor, columns: Tensor, largest: Tensor, scale: Tensor, ratio: Tensor, base: Tensor, slope: Tensor, gradients: Tensor
) -> None:
    """Compute w1train.kernels.noised_softmax.write_gradient."""
    num_rows, size = logits.shape
    grid = (num_rows, triton.cdiv(size, BLOCK))
    rows = [values.contiguous() for values in (columns, largest, scale, ratio, base, slope, gradients)]
    _write_noised_gradient[grid](logits, *rows, len(columns), num_rows, size, logits.stride(0), BLOCK=BLOCK, num_warps=8)


@triton.jit
def _noised_sums(logits, largest, scale, ratio, sums, num_rows, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, factor, signal_ratio = tl.load(largest + row), tl.load(scale + row), tl.load(ratio + row)
    logarithms = tl.zeros([BLOCK], dtype=tl.float32)
    shares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + lanes, mask=lanes < size, other=float("-inf")).to(tl.float32)
        predictions = tl.exp(values - top) * factor
        signal = predictions * signal_ratio
        above = 1.0 + signal
        # This is the logarithm of 1 + signal in full precision, because the rounding of the sum cancels in log(sum) / (sum - 1). Most ids
        # have a signal far below 1, of which the plain logarithm would leave a few digits or zero.
        exact = tl.where(above == 1.0, signal, tl.log(above) * (signal / tl.where(above == 1.0, 1.0, above - 1.0)))
        logarithms += exact
        shares += predictions * (signal / above)
    tl.store(sums + row, tl.sum(logarithms, axis=0))
    tl.store(sums + num_rows + row, tl.sum(shares, axis=0))


@triton.jit
def _write_noised_gradient(
    logits, columns, largest, scale, ratio, base, slope, gradients, num_columns, num_rows, size, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < size
    values = tl.load(logits + row * stride + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    predictions = tl.exp(values - tl.load(largest + row)) * tl.load(scale + row)
    signal = predictions * tl.load(ratio + row)
    outcome = predictions * (tl.load(base + row) + tl.load(slope + row) * (signal / (1.0 + signal)))
    for place in range(num_columns):
        column = tl.load(columns + place * num_rows + row)
        outcome += tl.where(lanes == column, tl.load(gradients + place * num_rows + row), 0.0)
    tl.store(logits + row * stride + lanes, outcome.to(logits.dtype.element_ty), mask=inside)
