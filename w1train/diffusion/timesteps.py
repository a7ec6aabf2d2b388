"""Random timesteps that are spread evenly over the global batch, computed from integers alone.

t = t_min + (t_max - t_min) u. The fraction u of sample i is stratified over each aligned group of ``num_strata``
consecutive samples of the global order: its stratum is (bit reversal of i's place in the group + a random rotation of the
group) mod num_strata, and u is uniform inside the stratum. Bit reversal spreads every aligned part of a group evenly, so each
rank and micro-batch sees all of [0, 1) and not one end of it. The rotation makes u independent of the place in the batch:
without it each place would have the same t for ever. u depends on the sample index, never on the batch size.

Segment k of a sample has u_k = u + k / golden ratio (mod 1): each u_k is uniform, and the u_k of a sample are spread evenly.

u is held as a 32-bit integer, and the noising probability as a 32-bit threshold, so that CPU and GPU agree to the last bit.

Shapes: b = samples, g = segments (stretches that share one t) per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.philox import Purpose, random_words_of_streams

_TWO_32 = 1 << 32
_GOLDEN_32 = 0x9E3779B9  # 2^32 / golden ratio, odd


def draw_fractions(config: DiffusionConfig, seed: int, sample_indices: Tensor, num_segments: int, draw: int = 0) -> Tensor:
    """Return stratified fractions u for the segments of each sample.

    Args:
        sample_indices: int64 [b], global sample indices (>= 0).
        num_segments: g.

    Returns:
        int64 [b, g], u * 2^32.
    """
    num_strata = config.num_strata
    group = torch.div(sample_indices, num_strata, rounding_mode="floor")
    place = _bit_reverse(sample_indices % num_strata, num_strata.bit_length() - 1)
    streams = [(Purpose.STRATUM, group), (Purpose.TIMESTEP, sample_indices)]
    rotation, jitter = (words[:, 0] for words in random_words_of_streams(seed, streams, draw=draw, num=1))
    stratum = (place + rotation % num_strata) % num_strata
    fraction = torch.div(stratum * _TWO_32 + jitter, num_strata, rounding_mode="floor")
    offsets = torch.arange(num_segments, device=sample_indices.device, dtype=torch.int64) * _GOLDEN_32
    return (fraction[:, None] + offsets[None, :]) % _TWO_32


def timesteps_from_fractions(config: DiffusionConfig, fractions: Tensor) -> Tensor:
    """Return t of u * 2^32, both [b, g], t in float64. Float64 holds u exactly, and one multiplication and one addition round in the same
    way on every device. In discrete time, t is rounded up to a step."""
    # The partner of a pair is at 1 - t, which must not fall below t_min either: a weight such as 1/t has no bound at 0.
    is_bounded = config.complementary and not config.is_band_of_pairs
    t_max = min(config.t_max, 1.0 - config.t_min) if is_bounded else config.t_max
    return on_a_step(config, config.t_min + (t_max - config.t_min) * (fractions.double() / _TWO_32))


def on_a_step(config: DiffusionConfig, timesteps: Tensor) -> Tensor:
    """Return the timesteps, float64, and in discrete time the steps i / T that end the intervals of the timesteps."""
    num = config.num_timesteps
    return timesteps if num == 0 else (timesteps * num).floor().add(1).clamp_max(num) / num


def antithetic(fractions: Tensor, sample_indices: Tensor) -> Tensor:
    """Return the fractions u * 2^32 of pairs, int64 [b, g]: those of the pair for its first sample, and 1 - u for its second sample."""
    return torch.where((sample_indices % 2 == 1)[:, None], _TWO_32 - 1 - fractions, fractions)


def word_thresholds(probabilities: Tensor) -> Tensor:
    """Return the int64 threshold of each probability: a random 32-bit word is below probability * 2^32 with this probability. Every word is
    below the threshold of probability 1."""
    return (probabilities.double() * _TWO_32).floor().to(torch.int64)


def _bit_reverse(values: Tensor, num_bits: int) -> Tensor:
    bits = torch.arange(num_bits, device=values.device)
    return (((values[:, None] >> bits) & 1) << (num_bits - 1 - bits)).sum(dim=1)
