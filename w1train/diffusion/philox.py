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

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

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
    LIKELIHOOD = 5
    """Which tokens of a completion are masked to estimate its likelihood (keyed by its tokens)."""
    EMBEDDING = 6
    """Noise on the embeddings of masked tokens (keyed by sample and position)."""
    ATTENTION = 7
    """Which pairs an annealed causal mask lets through (keyed by sample and query)."""


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each word in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of random words in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    multipliers, keys = _round_constants(key, c0.device, c0.dim())
    # A short tensor's time is that of starting the operations: lanes in pairs, [2, ...], halve their number, and working in place
    # spares a long one the allocations. A round leaves the pairs in the other order: (c2, c0) and (c3, c1), then back.
    multiplied, added, product = torch.stack([c0, c2]), torch.stack([c1, c3]), torch.empty((2, *c0.shape), dtype=c0.dtype, device=c0.device)
    lanes, added_lanes, product_lanes = multiplied.unbind(), added.unbind(), product.unbind()
    for multiplier, round_key in zip(multipliers, keys, strict=True):
        torch.mul(multiplied, multiplier, out=product)
        torch.bitwise_right_shift(product, 32, out=multiplied)
        lanes[0].bitwise_xor_(added_lanes[1])
        lanes[1].bitwise_xor_(added_lanes[0])
        # int64 wraps around, so the sign bit must be masked off the high word. Of the product, which is only added from now on,
        # the upper half does not matter before the end.
        multiplied.bitwise_xor_(round_key).bitwise_and_(_MASK32)
        added, product, added_lanes, product_lanes = product, added, product_lanes, added_lanes
    added.bitwise_and_(_MASK32)
    return lanes[0], added_lanes[0], lanes[1], added_lanes[1]


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
    return random_words_of_streams(seed, [(purpose, indices)], draw=draw, num=num)[0]


def random_words_of_streams(seed: int, streams: Sequence[tuple[Purpose, Tensor]], *, draw: int, num: int) -> list[Tensor]:
    """``random_words`` of several (purpose, indices) at the price of one: a few words cost what starting the operations costs."""
    assert 0 <= draw < 1 << 24
    assert num >= 1
    indices = torch.cat([indices for _, indices in streams])[:, None]
    stream = torch.cat([torch.full_like(indices, draw << 8 | int(purpose)) for purpose, indices in streams])[:, None]
    num_counters = -(-num // 4)
    position = torch.arange(num_counters, device=indices.device, dtype=torch.int64)[None, :]
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    words = torch.stack(philox_4x32((position, indices & _MASK32, (indices >> 32) & _MASK32, stream), key), dim=-1)
    return list(words.reshape(len(indices), 4 * num_counters)[:, :num].split([len(indices) for _, indices in streams]))


@lru_cache(maxsize=16)
def _round_constants(key: tuple[int, int], device: torch.device, num_dimensions: int) -> tuple[list[Tensor], list[Tensor]]:
    """Multipliers and keys of each round for the pair of lanes, [2, 1, ...]. Kept, because on a GPU making them is a copy from the host."""
    multipliers, keys = [], []
    k0, k1 = key
    for number in range(_NUM_ROUNDS):
        swapped = number % 2 == 1
        multipliers.append([_MULTIPLIER_1, _MULTIPLIER_0] if swapped else [_MULTIPLIER_0, _MULTIPLIER_1])
        keys.append([k0, k1] if swapped else [k1, k0])
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    constants = torch.tensor([multipliers, keys], device=device).reshape(2, _NUM_ROUNDS, 2, *[1] * num_dimensions)
    return list(constants[0]), list(constants[1])
