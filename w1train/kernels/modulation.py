"""RMSNorm with modulation by segment, and the gated residual: one function for each, which runs a Triton kernel or plain PyTorch.

    y = x / rms(x) * weight * (1 + scale[segment]) + shift[segment]
    y = residual + gate[segment] * x

Intermediate values are fp32 (fp64 if the input is fp64). The input and 1 / rms of each row are kept for the backward pass, but no
[s, b, h] tensor of modulation and no normalised copy of the input.

Shapes: s = tokens of this rank, b = samples, h = hidden size, g = segments of the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w1train.kernels.segments import Segments
from w1train.kernels.selection import Implementation, runs_triton
from w1train.runtime.ranges import kernel_group


@kernel_group("norm and modulation")
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    segments: Segments | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Apply RMSNorm (arXiv 1910.07467) and, with ``shift`` and ``scale``, adaLN's modulation (arXiv 2212.09748).

    Args:
        x: [s, b, h], or [m, h] with segments that have an index [m].
        weight: [h].
        shift, scale: [g, h]. Both are given, or both are None.
        segments: the row of shift and scale for each token. Without modulation it only saves work that layers share, and may be None.
        implementation: "auto" = Triton for CUDA tensors.

    Returns:
        A tensor like x. Gradients of shift and scale are summed over each segment's tokens, in the same order in every run with Triton.
    """
    assert (shift is None) == (scale is None)
    if segments is None:
        assert scale is None
        segments = Segments(None)
    if runs_triton(x, implementation, row_size=x.shape[-1]):
        return _TritonNorm.apply(x, weight, eps, shift, scale, segments)
    return _TorchNorm.apply(x, weight, eps, shift, scale, segments)


@kernel_group("norm and modulation")
def gate_residual(residual: Tensor, gate: Tensor, x: Tensor, segments: Segments, implementation: Implementation = "auto") -> Tensor:
    """Return residual + gate[segment] * x.

    Args:
        residual, x: [s, b, h].
        gate: [g, h].
    """
    if runs_triton(x, implementation, row_size=x.shape[-1]):
        return _TritonGate.apply(residual, gate, x, segments)
    return _TorchGate.apply(residual, gate, x, segments)


class _TorchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shift: Tensor | None, scale: Tensor | None, segments: Segments) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, weight, scale, segments.index)
        ctx.segments = segments
        y = (wide * rstd).mul_(weight)
        if shift is not None and scale is not None:
            y = torch.addcmul(segments.rows(shift.to(wide.dtype)), y, 1 + segments.rows(scale.to(wide.dtype)))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None, None]:
        x, rstd, weight, scale, _ = ctx.saved_tensors
        segments: Segments = ctx.segments
        wide, normed = gradient.to(rstd.dtype), x * rstd
        grad_shift = grad_scale = None
        if scale is None:
            grad_weight = (wide * normed).sum(dim=tuple(range(x.dim() - 1)))
            inner = wide * weight
        else:
            grad_shift = segments.sum(wide, len(scale))
            grad_normed = segments.sum(wide * normed, len(scale))
            grad_weight, grad_scale = _table_gradients(grad_normed, weight, scale)
            inner = wide * weight * (1 + segments.rows(scale.to(wide.dtype)))
            grad_shift = grad_shift.to(scale.dtype)
        grad_x = rstd * (inner - normed * (inner * normed).mean(dim=-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, grad_shift, grad_scale, None


def _table_gradients(grad_normed: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight [h] and scale [g, h], from the sums over segments of (gradient * x / rms) [g, h]. The sums
    suffice because all tokens of a segment have the same weight and scale."""
    grad_weight = (grad_normed * (1 + scale.to(grad_normed.dtype))).sum(dim=0)
    return grad_weight, (grad_normed * weight).to(scale.dtype)


class _TorchGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gate: Tensor, x: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(gate, x, segments.index)
        ctx.segments = segments
        return torch.addcmul(residual, segments.rows(gate), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, x, _ = ctx.saved_tensors
        segments: Segments = ctx.segments
        product = gradient.to(torch.promote_types(x.dtype, torch.float32)) * x
        return gradient, segments.sum(product, len(gate)).to(gate.dtype), gradient * segments.rows(gate), None


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shift: Tensor | None, scale: Tensor | None, segments: Segments) -> Tensor:
        from w1train.kernels import triton_modulation

        x = x.contiguous()
        y, rstd = triton_modulation.norm_forward(x, weight, eps, shift, scale, segments.index)
        ctx.save_for_backward(x, rstd, weight, scale, segments.index)
        ctx.segments = segments
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None, None]:
        from w1train.kernels import triton_modulation

        x, rstd, weight, scale, _ = ctx.saved_tensors
        # Without modulation one segment stands for all rows.
        pieces = ctx.segments.pieces(rstd.numel(), 1 if scale is None else len(scale), x.device)
        grad_x, grad_normed, grad_shift = triton_modulation.norm_backward(gradient.contiguous(), x, rstd, weight, scale, pieces)
        if scale is None:
            return grad_x, grad_normed[0].to(weight.dtype), None, None, None, None
        grad_weight, grad_scale = _table_gradients(grad_normed, weight, scale)
        return grad_x, grad_weight.to(weight.dtype), None, grad_shift.to(scale.dtype), grad_scale, None


class _TritonGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gate: Tensor, x: Tensor, segments: Segments) -> Tensor:
        from w1train.kernels import triton_modulation

        x = x.contiguous()
        ctx.save_for_backward(gate, x, segments.index)
        ctx.segments = segments
        return triton_modulation.gate_forward(residual.contiguous(), gate, x, segments.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from w1train.kernels import triton_modulation

        gate, x, _ = ctx.saved_tensors
        pieces = ctx.segments.pieces(x.numel() // x.shape[-1], len(gate), x.device)
        grad_x, grad_gate = triton_modulation.gate_backward(gradient.contiguous(), x, gate, pieces)
        return gradient, grad_gate.to(gate.dtype), grad_x, None
