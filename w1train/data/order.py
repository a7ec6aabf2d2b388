"""A random order that is computed instead of stored: a keyed permutation of any number of items, one item at a time.

A stored random order of 10^10 samples takes 80 GB, and drawing it takes minutes at every start of a run. Here the item at a place of the
order is computed from the place alone, in microseconds, wherever a run starts.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

_NUM_ROUNDS = 12
_MIN_BITS = 8
_MASK64 = (1 << 64) - 1


class Stream(IntEnum):
    """The uses of an epoch's random numbers. Two uses never share a number."""

    SAMPLES = 1
    """The order of the samples."""
    START = 2
    """The document that comes first in an epoch's concatenation of documents."""


def random_words(seed: int, epoch: int, stream: Stream, num: int) -> list[int]:
    """Return ``num`` random 64-bit words of Philox 4x64 with the key (seed, epoch) and ``stream`` as the top word of its counter.

    NumPy promises the same raw output of its bit generators on every platform and in every version. It does not promise this for its
    shuffles.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, stream], dtype=np.uint64))
    return [int(word) for word in generator.random_raw(num)]


def permuted(place: int, num_items: int, seed: int, epoch: int, stream: Stream = Stream.SAMPLES) -> int:
    """Return the item at ``place`` in a random order of range(num_items), which depends on the other arguments alone.

    A Feistel network permutes the numbers that have as many bits as num_items - 1. It changes each half of the bits in turn by a keyed hash
    of the other half. Each change can be undone, so two places never get the same number. A number that is not an item is permuted again
    until the result is an item (cycle-walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which takes fewer
    than two permutations on average if there are more than 128 items. The network mixes few bits badly, so it has at least eight.
    """
    assert 0 <= place < num_items, (place, num_items)
    keys = _round_keys(seed, epoch, stream)
    num_bits = max(_MIN_BITS, (num_items - 1).bit_length())
    low_bits = num_bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (num_bits - low_bits)) - 1
    while True:
        low, high = place & low_mask, place >> low_bits
        for low_key, high_key in keys:
            low ^= _mix(high ^ low_key) & low_mask
            high ^= _mix(low ^ high_key) & high_mask
        place = high << low_bits | low
        if place < num_items:
            return place


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int, stream: Stream) -> list[tuple[int, int]]:
    words = random_words(seed, epoch, stream, _NUM_ROUNDS)
    return list(zip(words[::2], words[1::2], strict=True))


def _mix(word: int) -> int:
    """Apply SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): every bit of the result depends on every bit of the word."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)
