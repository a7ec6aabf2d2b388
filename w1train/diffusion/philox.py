"""Counter-based random numbers: Philox4x32-10 in integer operations on tensors or (on the CPU) on NumPy's arrays.

A random number here is a pure function of (seed, sample index, draw, purpose, position), never of a generator's state.
It is therefore bit-identical on CPU and GPU, under every parallel layout and micro-batch size, and after a resume. No state has to be
saved. (A generator with a state differs between tensor- and context-parallel ranks unless every rank draws in the same order, and its state
must survive a restart. Trainers lose exactness in both ways.)

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the constants and the known-answer vectors
of the tests are those of the authors' Random123 distribution.

Shapes: b = samples, n = numbers per sample.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_NUM_ROUNDS = 10
_HIGH = 1 if sys.byteorder == "little" else 0
"""Index of the upper one of the two 32-bit halves of a 64-bit word."""
_COUNTERS_AT_ONCE = 16384
"""Counters that are computed together. NumPy keeps 80 bytes for each of them during the computation, and with many more counters these
bytes would not fit into a core's cache."""


class Purpose(IntEnum):
    """The use of a stream of numbers. Each use has its own counters, so no two uses share a number."""

    NOISE = 0
    """The choice of the noised tokens, and of the tokens that noise puts in their places."""
    TIMESTEP = 1
    """The place of a sample's t inside its stratum."""
    STRATUM = 2
    """The rotation of the strata of a group of samples."""
    LENGTH = 3
    """The decision whether a sample is cut to a random length, and this length."""
    WEIGHT = 4
    """Initial weights (keyed by parameter name, not by sample)."""
    LIKELIHOOD = 5
    """The choice of the tokens of a completion that are masked to estimate its likelihood (keyed by its tokens)."""
    EMBEDDING = 6
    """Noise on the embeddings of masked tokens (keyed by sample and position)."""
    ATTENTION = 7
    """The choice of the pairs that an annealed causal mask lets through (keyed by sample and query)."""
    EDIT = 8
    """The choice of edited samples, and their edits."""


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each word in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of random words in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    multipliers, keys = _round_constants(key, c0.device, c0.dim())
    # For a short tensor most of the time is spent on starting operations. Lanes are therefore kept in pairs, [2, ...], which halves the
    # number of operations. For a long tensor, working in place saves allocations. A round leaves the pairs in the other order, (c2, c0) and
    # (c3, c1), and the next round restores the order.
    multiplied, added, product = torch.stack([c0, c2]), torch.stack([c1, c3]), torch.empty((2, *c0.shape), dtype=c0.dtype, device=c0.device)
    lanes, added_lanes, product_lanes = multiplied.unbind(), added.unbind(), product.unbind()
    for multiplier, round_key in zip(multipliers, keys, strict=True):
        torch.mul(multiplied, multiplier, out=product)
        torch.bitwise_right_shift(product, 32, out=multiplied)
        lanes[0].bitwise_xor_(added_lanes[1])
        lanes[1].bitwise_xor_(added_lanes[0])
        # int64 wraps around, so the sign bit must be masked off the high word. The product is only added from now on, and its upper half
        # does not matter before the end.
        multiplied.bitwise_xor_(round_key).bitwise_and_(_MASK32)
        added, product, added_lanes, product_lanes = product, added, product_lanes, added_lanes
    added.bitwise_and_(_MASK32)
    return lanes[0], added_lanes[0], lanes[1], added_lanes[1]


def philox_4x32_numpy(counter: Sequence[NDArray[np.uint32]], key: tuple[int, int]) -> NDArray[np.int64]:
    """Compute ``philox_4x32`` with NumPy, on the CPU.

    torch takes microseconds to start each operation, and it has no unsigned numbers whose halves can be read without computing them.
    NumPy takes half of torch's time for a few words, and slightly less for many.

    Args:
        counter: four arrays that broadcast to one shape, [...].
        key: two words in [0, 2^32).

    Returns:
        int64 [..., 4]: the four words of each counter.
    """
    c0, c1, c2, c3 = counter
    shape = np.broadcast(c0, c1, c2, c3).shape
    # Lanes are in pairs, which change their order in each round, as in philox_4x32.
    multiplied, added = np.empty((2, *shape), np.uint32), np.empty((2, *shape), np.uint32)
    multiplied[0], multiplied[1], added[0], added[1] = c0, c2, c1, c3
    product, next_product = np.empty((2, *shape), np.uint64), np.empty((2, *shape), np.uint64)
    for multiplier, round_key in zip(*_round_arrays(key, len(shape)), strict=True):
        np.multiply(multiplied, multiplier, out=product)
        halves = product.view(np.uint32).reshape(2, *shape, 2)
        np.bitwise_xor(halves[..., _HIGH], added[::-1], out=multiplied)
        np.bitwise_xor(multiplied, round_key, out=multiplied)
        added = halves[..., 1 - _HIGH]
        product, next_product = next_product, product  # the next round reads what this round has added
    words = np.empty((*shape, 4), np.int64)
    words[..., 0], words[..., 1], words[..., 2], words[..., 3] = multiplied[0], added[0], multiplied[1], added[1]
    return words


def random_words(seed: int, indices: Tensor, *, draw: int, purpose: Purpose, num: int) -> Tensor:
    """Return random 32-bit words that depend only on the arguments.

    Args:
        seed: seed of the run, in [0, 2^64).
        indices: int64 [b], the samples or groups that the words belong to (global sample indices, or stratum groups); any 64-bit value.
        draw: repetition for the same samples: 0 in training, 1 + i for the i-th validation timestep.
        purpose: the stream.
        num: n, words per index.

    Returns:
        int64 [b, n], uniform in [0, 2^32).
    """
    return random_words_of_streams(seed, [(purpose, indices)], draw=draw, num=num)[0]


def random_words_of_streams(seed: int, streams: Sequence[tuple[Purpose, Tensor]], *, draw: int, num: int) -> list[Tensor]:
    """Return the result of ``random_words`` for several (purpose, indices). This costs as much as one call, because starting the operations
    takes more time than computing a few words."""
    assert 0 <= draw < 1 << 24
    assert num >= 1
    assert all(indices.dtype == torch.int64 for _, indices in streams)
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    sizes = [len(indices) for _, indices in streams]
    num_counters = -(-num // 4)
    numbered = [(draw << 8 | int(purpose), indices) for purpose, indices in streams]
    draw_words = _words_on_cpu if streams[0][1].device.type == "cpu" else _words_on_device
    words = draw_words(numbered, num_counters, key)
    return list(words.reshape(sum(sizes), 4 * num_counters)[:, :num].split(sizes))


def _words_on_device(streams: Sequence[tuple[int, Tensor]], num_counters: int, key: tuple[int, int]) -> Tensor:
    """Return the words of several (stream, indices), one after the other: int64 [rows, num_counters, 4]."""
    indices = torch.cat([indices for _, indices in streams])[:, None]
    stream = torch.cat([torch.full_like(indices, number) for number, indices in streams])[:, None]
    position = torch.arange(num_counters, device=indices.device, dtype=torch.int64)[None, :]
    return torch.stack(philox_4x32((position, indices & _MASK32, (indices >> 32) & _MASK32, stream), key), dim=-1)


def _words_on_cpu(streams: Sequence[tuple[int, Tensor]], num_counters: int, key: tuple[int, int]) -> Tensor:
    """Return the words that ``_words_on_device`` returns."""
    indices = np.concatenate([indices.numpy() for _, indices in streams])[:, None]
    stream = np.repeat(np.array([number for number, _ in streams], np.uint32), [len(indices) for _, indices in streams])[:, None]
    position = np.arange(num_counters, dtype=np.uint32)[None, :]
    words = np.empty((len(indices), num_counters, 4), np.int64)
    num_rows = max(1, _COUNTERS_AT_ONCE // num_counters)
    for rows in (slice(start, start + num_rows) for start in range(0, len(indices), num_rows)):
        index = indices[rows]
        words[rows] = philox_4x32_numpy((position, index.astype(np.uint32), (index >> 32).astype(np.uint32), stream[rows]), key)
    return torch.from_numpy(words)


@lru_cache(maxsize=16)
def _round_constants(key: tuple[int, int], device: torch.device, num_dimensions: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return multipliers and keys of each round for the pair of lanes, [2, 1, ...]. They are cached, because a GPU needs a copy from the
    host to make them."""
    constants = torch.tensor(_schedule(key), device=device).reshape(2, _NUM_ROUNDS, 2, *[1] * num_dimensions)
    return list(constants[0]), list(constants[1])


@lru_cache(maxsize=16)
def _round_arrays(key: tuple[int, int], num_dimensions: int) -> tuple[list[NDArray[np.uint64]], list[NDArray[np.uint32]]]:
    """Return ``_round_constants`` as NumPy's arrays."""
    constants = np.array(_schedule(key), np.uint64).reshape(2, _NUM_ROUNDS, 2, *[1] * num_dimensions)
    return list(constants[0]), list(constants[1].astype(np.uint32))


def _schedule(key: tuple[int, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return (multipliers, keys) of each round for a pair of lanes."""
    multipliers, keys = [], []
    k0, k1 = key
    for number in range(_NUM_ROUNDS):
        swapped = number % 2 == 1
        multipliers.append([_MULTIPLIER_1, _MULTIPLIER_0] if swapped else [_MULTIPLIER_0, _MULTIPLIER_1])
        keys.append([k0, k1] if swapped else [k1, k0])
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return multipliers, keys
