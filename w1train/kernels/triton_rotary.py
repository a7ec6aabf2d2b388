"""The Triton kernel of rotary.py.

Shapes: s = sequence_length, b = samples, n = heads, d = channels of a head, r = channels that are rotated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(t: Tensor, angles: Tensor, direction: float) -> Tensor:
    """Return t [s, b, n, d], whose first r channels are turned by direction * angles [s, b, 1, r], in a contiguous tensor. t may have any
    strides."""
    if t.stride(-1) != 1:
        t = t.contiguous()
    length, samples, heads, channels = t.shape
    output = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    pairs, rest = angles.shape[-1] // 2, channels - angles.shape[-1]
    blocks = {"HEADS": triton.next_power_of_2(heads), "PAIRS": triton.next_power_of_2(pairs), "REST": triton.next_power_of_2(rest)}
    strides = t.stride(0), t.stride(1), t.stride(2)
    _rotate[(length * samples,)](t, angles.contiguous(), output, samples, heads, pairs, channels, *strides, direction, **blocks)
    return output


@triton.jit
def _rotate(
    t,
    angles,
    output,
    samples,
    heads,
    pairs,
    channels,
    s_stride,
    b_stride,
    n_stride,
    direction,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < pairs)
    turn = tl.load(angles + token * 2 * pairs + pair, mask=pair < pairs, other=0.0)
    cosine, sine = tl.cos(turn), tl.sin(turn) * direction
    source = t + token // samples * s_stride + token % samples * b_stride + head * n_stride
    first = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + pairs + pair, mask=inside, other=0.0).to(tl.float32)
    target = output + token * heads * channels + head * channels
    tl.store(target + pair, (first * cosine - second * sine).to(output.dtype.element_ty), mask=inside)
    tl.store(target + pairs + pair, (second * cosine + first * sine).to(output.dtype.element_ty), mask=inside)
    if REST > 0:
        channel = 2 * pairs + tl.arange(0, REST)[None, :]
        kept = (head < heads) & (channel < channels)
        tl.store(target + channel, tl.load(source + channel, mask=kept), mask=kept)
