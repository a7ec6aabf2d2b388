"""Rotary embedding with an angle for every token, as one Triton kernel.

Libraries' fused kernels take one angle a place, for all samples; where positions restart with each document, every sample has its own.
The twin in plain PyTorch is megatron-core's unfused ``apply_rotary_pos_emb``, which rounds cosines and sines to the input's precision
first; this one does not.

Shapes: s = sequence_length, b = samples, n = heads, d = channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply_rotary(t: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of channels (i, i + d / 2) of t [s, b, n, d] by angles, float32 [s, b, 1, d] (both halves alike).

    The signature is that of transformer-engine's kernel in megatron-core's ``rope_utils``, whose place it takes.
    """
    assert not interleaved
    assert angles.shape[-1] == t.shape[-1]
    return _Rotary.apply(t, angles)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, angles: Tensor) -> Tensor:
        from w1train.kernels import triton_rotary

        ctx.save_for_backward(angles)
        return triton_rotary.rotate(t, angles, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        from w1train.kernels import triton_rotary

        (angles,) = ctx.saved_tensors
        return triton_rotary.rotate(gradient, angles, -1.0), None
