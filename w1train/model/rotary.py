"""Rotary position embedding at given positions.

Shapes: b = samples, l = sequence_length, d = head channels that are rotated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from w1train.config.schema import ModelConfig


def rotary_angles(positions: Tensor, channels: int, model: ModelConfig) -> Tensor:
    """Return the angles of RoPE (arXiv 2104.09864), in the half-split layout. megatron-core leaves the channels of a head
    beyond d as they are.

    megatron-core's own tables have the positions from 0 to l - 1. Here positions restart with each document, so each sample has its own.

    Args:
        positions: int [b, l].

    Returns:
        float32 [l, b, 1, d], as megatron-core's ``apply_rotary_pos_emb`` takes them.
    """
    angles = positions.transpose(0, 1).float()[..., None] * rotary_frequencies(channels, model, positions.device)
    return torch.cat([angles, angles], dim=-1)[:, :, None]


def rotary_frequencies(channels: int, model: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Return how many radians each pair of channels turns from one position to the next, float32 [d / 2].

    With "llama3" (arXiv 2407.21783, section 3.4.2), pairs that turn often within the original length keep their frequency. Pairs that turn
    less than once within it turn more slowly, so that they cover the longer context. The frequencies of the pairs between them are a
    mixture.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    frequencies = 1.0 / model.rope_base**exponents
    if model.rope_scaling == "none":
        return frequencies
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    turns = model.rope_original_length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / model.rope_scaling_factor
