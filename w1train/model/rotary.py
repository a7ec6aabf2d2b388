"""Rotary position embedding at given positions.

Shapes: b = samples, l = sequence_length, d = head channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, channels: int, base: float) -> Tensor:
    """Angles of RoPE (arXiv 2104.09864), half-split layout, all channels rotated.

    megatron-core's own tables run from 0 to l - 1; here positions restart with each document, so each sample has its own.

    Args:
        positions: int [b, l].

    Returns:
        float32 [l, b, 1, d], as megatron-core's ``apply_rotary_pos_emb`` takes them.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    angles = positions.transpose(0, 1).float()[..., None] * (1.0 / base**exponents)
    return torch.cat([angles, angles], dim=-1)[:, :, None]
