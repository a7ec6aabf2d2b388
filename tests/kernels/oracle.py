"""What the kernels compute, in a line of plain autograd each; and how far an implementation is from it in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.row_terms import dense_term, make_term
from w1train.kernels.modulation import gate_residual, rms_norm
from w1train.kernels.segments import Segments
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import Vocabulary

EPS = 1e-6
# Name -> number of segments, and the segment of each token of [7, 3] (None = the sample's).
SEGMENTS: dict[str, tuple[int, Any]] = {
    "by-sample": (3, None),
    "one": (1, lambda shape: torch.zeros(shape, dtype=torch.long)),
    "contiguous": (5, lambda shape: torch.arange(shape.numel()).reshape(shape) // 5),
    "scattered": (4, lambda shape: torch.randint(0, 4, shape)),
    # The clean stream's case: one long segment; and a row of the table that no token has.
    "uneven": (6, lambda shape: torch.where(torch.rand(shape) < 0.8, 2, torch.randint(0, 5, shape))),
}


def tokens(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def table(num_segments: int, size: int, dtype: torch.dtype) -> Tensor:
    """A slice of a wider table, as adaLN's six vectors are."""
    return torch.randn((num_segments, 3 * size), dtype=torch.float64).to(dtype)[:, size : 2 * size].requires_grad_()


def segments_of(name: str, shape: tuple[int, ...]) -> tuple[int, Tensor | None]:
    count, make = SEGMENTS[name]
    return count, None if make is None else make(torch.Size(shape))


def rows_of(index: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return torch.arange(shape[1]).expand(*shape) if index is None else index


def norm_by_autograd(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, rows: Tensor) -> Tensor:
    y = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    return y if scale is None or shift is None else y * (1 + scale[rows]) + shift[rows]


def compare(
    function: Callable[..., Tensor], by_autograd: Callable[..., Tensor], inputs: Sequence[Tensor | None], tolerance: float
) -> list[Tensor]:
    """Output and gradients of ``function`` against ``by_autograd`` in fp64, by relative norm; returns them."""
    present = [value for value in inputs if value is not None]
    output = function(*inputs)
    upstream = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    found = [output, *torch.autograd.grad(output, present, upstream)]
    wide = [None if value is None else value.detach().double().requires_grad_() for value in inputs]
    expected = by_autograd(*wide)
    wanted = [expected, *torch.autograd.grad(expected, [value for value in wide if value is not None], upstream.double())]
    for place, (ours, oracle) in enumerate(zip(found, wanted, strict=True)):
        error = (ours.double() - oracle).norm() / oracle.norm().clamp_min(1e-9)
        assert error <= tolerance, f"{'output' if place == 0 else f'gradient of input {place - 1}'}: relative error {error:.1e}"
    return found


def check_norm(name: str, shape: tuple[int, int], size: int, dtype: torch.dtype, implementation: Any, tolerance: float) -> list[Tensor]:
    count, index = segments_of(name, shape)
    inputs = [tokens((*shape, size), dtype), tokens((size,), dtype), table(count, size, dtype), table(count, size, dtype)]
    segments, rows = Segments(index), rows_of(index, shape)
    return compare(
        lambda x, weight, shift, scale: rms_norm(x, weight, EPS, shift, scale, segments, implementation),
        lambda x, weight, shift, scale: norm_by_autograd(x, weight, shift, scale, rows),
        inputs,
        tolerance,
    )


def check_plain_norm(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, implementation: Any, tolerance: float, *, with_segments: bool = False
) -> None:
    """with_segments: as a model without conditioning has it in block diffusion, where tokens have segments that nothing modulates."""
    segments = Segments(torch.arange(math.prod(shape)).reshape(shape) % 4) if with_segments else None
    compare(
        lambda x, weight: rms_norm(x, weight, EPS, segments=segments, implementation=implementation),
        lambda x, weight: norm_by_autograd(x, weight, None, None, torch.zeros(1)),
        [tokens((*shape, size), dtype), tokens((size,), dtype)],
        tolerance,
    )


def check_gate(name: str, shape: tuple[int, int], size: int, dtype: torch.dtype, implementation: Any, tolerance: float) -> list[Tensor]:
    count, index = segments_of(name, shape)
    segments, rows = Segments(index), rows_of(index, shape)
    return compare(
        lambda residual, gate, x: gate_residual(residual, gate, x, segments, implementation),
        lambda residual, gate, x: residual + gate[rows] * x,
        [tokens((*shape, size), dtype), table(count, size, dtype), tokens((*shape, size), dtype)],
        tolerance,
    )


def one_rank(chunk_size: int, excluded: int | None = None, implementation: Any = "auto") -> Head:
    """A head whose vocabulary is not split over ranks."""
    return Head(Vocabulary(None, 0, excluded, implementation), chunk_size, sum_row_gradients=True)


def dense_logits(rows: Tensor, weight: Tensor, excluded: int | None) -> Tensor:
    """Logits [m, vocabulary], -inf at the excluded token."""
    logits = rows @ weight.t()
    return logits if excluded is None else logits.index_fill(1, torch.tensor([excluded]), float("-inf"))


def check_term(
    name: str,
    num_rows: int,
    vocabulary: int,
    chunk_size: int,
    excluded: int | None,
    dtype: torch.dtype,
    implementation: Any,
    tolerance: float,
) -> None:
    """One rank; several are in tests/model/test_row_terms.py and tests/parallel."""
    size, term = 12, make_term(name, num_rows, vocabulary, excluded)
    head = one_rank(chunk_size, excluded, implementation)
    compare(
        lambda rows, weight: linear_row_terms(rows, weight, [term], head)[0],
        lambda rows, weight: dense_term(term, dense_logits(rows, weight, excluded)),
        [tokens((num_rows, size), dtype), tokens((vocabulary, size), dtype)],
        tolerance,
    )
