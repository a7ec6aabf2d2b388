"""Rotary embedding with an angle for every token, as one Triton kernel.

Fused kernels of libraries take one angle for each position, which all samples share. Here positions restart with each document, so
every sample has its own. The twin in plain PyTorch is megatron-core's unfused ``apply_rotary_pos_emb``, which first rounds cosines and
sines to the precision of the input; this kernel does not.

Shapes: s = sequence_length, b = samples, n = heads, d = channels of a head, r = channels that are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply_rotary(t: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of channels (i, i + r / 2), i < r / 2, of t [s, b, n, d] by angles, float32 [s, b, 1, r], whose two halves are
    equal. The other d - r channels stay as they are.

    The signature is that of transformer-engine's kernel in megatron-core's ``rope_utils``, which this function replaces.
    """
    assert not interleaved
    assert angles.shape[-1] <= t.shape[-1]
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
