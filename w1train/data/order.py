"""Orders that are computed instead of stored: a keyed permutation of any number of items, one item at a time.

A shuffled index of 10^10 samples is 80 GB, and drawing it takes minutes at every start. Here a place in the order is found by
arithmetic on the place alone, in microseconds, wherever a run begins.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

_NUM_ROUNDS = 12
_MIN_BITS = 8
_MASK64 = (1 << 64) - 1


class Stream(IntEnum):
    """What an epoch's random numbers are for; no two uses share a number."""

    SAMPLES = 1
    """The order of the samples."""
    START = 2
    """The document that an epoch's concatenation begins with."""


def random_words(seed: int, epoch: int, stream: Stream, num: int) -> list[int]:
    """``num`` random 64-bit words: Philox 4x64 with key (seed, epoch), its counter's top word being ``stream``.

    NumPy keeps the raw output of its bit generators the same on every platform and in every version, as it does not for its shuffles.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, stream], dtype=np.uint64))
    return [int(word) for word in generator.random_raw(num)]


def permuted(place: int, num_items: int, seed: int, epoch: int, stream: Stream = Stream.SAMPLES) -> int:
    """The item at ``place`` in a random order of range(num_items) that depends on the other arguments alone.

    A Feistel network permutes the numbers of as many bits as num_items - 1 has: each half is changed in turn by a keyed hash of the
    other one, which can be undone, so no number comes twice. A result beyond the items is sent through again until it is one
    (cycle-walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which takes less than two turns on
    average. Few bits mix badly, so there are at least eight.
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
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): every bit of the result depends on every bit of the word."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)
