"""Counter-based random numbers: Philox4x32-10 in integer tensor operations.

A random number here is a pure function of (seed, sample index, draw, purpose, position), never of a generator's state.
So it is bit-identical on CPU and GPU, under every parallel layout and micro-batch size, and after a resume, and there
is nothing to save. (A stateful generator differs between tensor- and context-parallel ranks unless every rank draws
in the same order, and its state must survive a restart: two ways in which public trainers lose exactness.)

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the constants and the known-answer vectors
of the tests are those of the authors' Random123 distribution.

Shapes: b = samples, n = numbers per sample.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_NUM_ROUNDS = 10


class Purpose(IntEnum):
    """What a stream of numbers is for; each has its own counters, so no two uses share a number."""

    MASK = 0
    """Which tokens are masked."""
    TIMESTEP = 1
    """Where a sample's t lies inside its stratum."""
    STRATUM = 2
    """How the strata of a group of samples are rotated."""
    LENGTH = 3
    """Whether a sample is cut to a random length, and to which."""
    WEIGHT = 4
    """Initial weights (keyed by parameter name, not by sample)."""


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each word in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of random words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high_0, low_0 = _multiply_high_low(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply_high_low(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def random_words(seed: int, indices: Tensor, *, draw: int, purpose: Purpose, num: int) -> Tensor:
    """Random 32-bit words that depend on nothing but the arguments.

    Args:
        seed: seed of the run, in [0, 2^64).
        indices: int64 [b], what the numbers belong to (global sample indices, or stratum groups); any 64-bit value.
        draw: repetition for the same samples: 0 in training, 1 + i for the i-th validation timestep.
        purpose: the stream.
        num: n, words per index.

    Returns:
        int64 [b, n], uniform in [0, 2^32).
    """
    assert 0 <= draw < 1 << 24 and num >= 1
    num_counters = -(-num // 4)
    position = torch.arange(num_counters, device=indices.device, dtype=torch.int64)[None, :]
    low, high = (indices & _MASK32)[:, None], ((indices >> 32) & _MASK32)[:, None]
    stream = torch.full_like(position, draw << 8 | int(purpose))
    counter = torch.broadcast_tensors(position, low, high, stream)
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    words = torch.stack(philox_4x32((counter[0], counter[1], counter[2], counter[3]), key), dim=-1)
    return words.reshape(len(indices), 4 * num_counters)[:, :num]


def _multiply_high_low(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product; int64 wraps around, so the sign bit must be masked off the high word."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32
