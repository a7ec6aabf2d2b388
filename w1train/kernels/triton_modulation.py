"""The Triton kernels of modulation.py. A program holds whole rows in registers, and reads and writes each tensor once.

Shapes: n = rows, h = hidden size, g = segments, p = pieces (w1train.kernels.segments).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from w1train.kernels.segments import Pieces

COLUMNS_PER_REDUCTION = 256


def norm_forward(
    x: Tensor, weight: Tensor, eps: float, shift: Tensor | None, scale: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y, a tensor like x [..., h], and 1 / rms, float32 [..., 1]."""
    size = x.shape[-1]
    y, rstd = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    shift_stride, scale_stride = _row_stride(shift), _row_stride(scale)
    _norm_forward[(rstd.numel(),)](
        x, weight, shift, scale, index, y, rstd, eps, size, 1 if scale is None else len(scale), shift_stride, scale_stride,
        MODULATED=scale is not None, INDEXED=index is not None, **_block(size),
    )  # fmt: skip
    return y, rstd


def norm_backward(
    gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, scale: Tensor | None, pieces: Pieces
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x, and two sums over each segment's rows, float32 [g, h]: of gradient * x / rms and of the gradient."""
    size, grad_x = x.shape[-1], torch.empty_like(x)
    partial = torch.empty((2, len(pieces.start), size), dtype=torch.float32, device=x.device)
    _norm_backward[(len(pieces.start),)](
        gradient, x, rstd, weight, scale, pieces.order, pieces.start, pieces.end, pieces.segment, grad_x, partial[0], partial[1],
        size, _row_stride(scale), MODULATED=scale is not None, **_block(size),
    )  # fmt: skip
    return grad_x, _add_pieces(partial[0], pieces), _add_pieces(partial[1], pieces)


def gate_forward(residual: Tensor, gate: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """Return residual + gate[segment] * x."""
    size, y = x.shape[-1], torch.empty_like(x)
    _gate_forward[(x.numel() // size,)](
        residual, gate, x, index, y, size, len(gate), _row_stride(gate), INDEXED=index is not None, **_block(size)
    )
    return y


def gate_backward(gradient: Tensor, x: Tensor, gate: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, and of the gate in fp32 [g, h]."""
    size, grad_x = x.shape[-1], torch.empty_like(x)
    partial = torch.empty((len(pieces.start), size), dtype=torch.float32, device=x.device)
    _gate_backward[(len(pieces.start),)](
        gradient, x, gate, pieces.order, pieces.start, pieces.end, pieces.segment, grad_x, partial, size, _row_stride(gate), **_block(size)
    )
    return grad_x, _add_pieces(partial, pieces)


def _add_pieces(partial: Tensor, pieces: Pieces) -> Tensor:
    """Return the sums of each segment's pieces, [g, h], from float32 [p, h]."""
    num_segments, size = len(pieces.first) - 1, partial.shape[-1]
    sums = torch.empty((num_segments, size), dtype=torch.float32, device=partial.device)
    grid = (num_segments, triton.cdiv(size, COLUMNS_PER_REDUCTION))
    _sum_pieces[grid](partial, pieces.first, sums, size, BLOCK=COLUMNS_PER_REDUCTION)
    return sums


def _row_stride(table: Tensor | None) -> int:
    """Return the number of elements from one row to the next. Tables are slices of one wide table, and are not copied."""
    assert table is None or table.stride(-1) == 1
    return 0 if table is None else table.stride(0)


def _block(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@triton.jit
def _norm_forward(
    x, weight, shift, scale, index, y, rstd, eps, size, num_samples, shift_stride, scale_stride,
    MODULATED: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    values = values * inverse * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        segment = tl.load(index + row) if INDEXED else row % num_samples
        factor = 1.0 + tl.load(scale + segment * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        values = values * factor + tl.load(shift + segment * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, values.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, inverse)


@triton.jit
def _norm_backward(
    gradient, x, rstd, weight, scale, order, starts, ends, segments, grad_x, sums_normed, sums_gradient, size, scale_stride,
    MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        segment = tl.load(segments + piece).to(tl.int64)
        factor = factor * (1.0 + tl.load(scale + segment * scale_stride + columns, mask=inside, other=0.0).to(tl.float32))
    of_normed = tl.zeros([BLOCK], dtype=tl.float32)
    of_gradient = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(tl.load(starts + piece), tl.load(ends + piece)):
        row = tl.load(order + place).to(tl.int64)
        inverse = tl.load(rstd + row)
        normed = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32) * inverse
        upstream = tl.load(gradient + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        of_normed += upstream * normed
        of_gradient += upstream
        inner = upstream * factor
        outcome = inverse * (inner - normed * (tl.sum(inner * normed, axis=0) / size))
        tl.store(grad_x + row * size + columns, outcome.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(sums_normed + piece * size + columns, of_normed, mask=inside)
    tl.store(sums_gradient + piece * size + columns, of_gradient, mask=inside)


@triton.jit
def _gate_forward(residual, gate, x, index, y, size, num_samples, gate_stride, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    segment = tl.load(index + row) if INDEXED else row % num_samples
    opening = tl.load(gate + segment * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(residual + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, (stream + opening * branch).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(gradient, x, gate, order, starts, ends, segments, grad_x, sums, size, gate_stride, BLOCK: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    segment = tl.load(segments + piece).to(tl.int64)
    opening = tl.load(gate + segment * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(tl.load(starts + piece), tl.load(ends + piece)):
        row = tl.load(order + place).to(tl.int64)
        upstream = tl.load(gradient + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        total += upstream * tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * size + columns, (upstream * opening).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(sums + piece * size + columns, total, mask=inside)


@triton.jit
def _sum_pieces(partial, first, sums, size, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for piece in range(tl.load(first + segment), tl.load(first + segment + 1)):
        total += tl.load(partial + piece * size + columns, mask=inside, other=0.0)
    tl.store(sums + segment * size + columns, total, mask=inside)
