"""The Triton kernel of rotary.py.

Shapes: s = sequence_length, b = samples, n = heads, d = channels of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(t: Tensor, angles: Tensor, direction: float) -> Tensor:
    """Return t [s, b, n, d] turned by direction * angles [s, b, 1, d], in a contiguous tensor. t may have any strides."""
    if t.stride(-1) != 1:
        t = t.contiguous()
    length, samples, heads, channels = t.shape
    output = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    blocks = {"HEADS": triton.next_power_of_2(heads), "PAIRS": triton.next_power_of_2(channels // 2)}
    _rotate[(length * samples,)](
        t, angles.contiguous(), output, samples, heads, channels // 2, t.stride(0), t.stride(1), t.stride(2), direction, **blocks
    )
    return output


@triton.jit
def _rotate(t, angles, output, samples, heads, pairs, s_stride, b_stride, n_stride, direction, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < pairs)
    turn = tl.load(angles + token * 2 * pairs + pair, mask=pair < pairs, other=0.0)
    cosine, sine = tl.cos(turn), tl.sin(turn) * direction
    source = t + token // samples * s_stride + token % samples * b_stride + head * n_stride + pair
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + pairs, mask=inside, other=0.0).to(tl.float32)
    target = output + token * heads * 2 * pairs + head * 2 * pairs + pair
    tl.store(target, (first * cosine - second * sine).to(output.dtype.element_ty), mask=inside)
    tl.store(target + pairs, (second * cosine + first * sine).to(output.dtype.element_ty), mask=inside)
