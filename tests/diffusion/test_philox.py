"""Philox4x32-10 against the known-answer vectors published with Random123."""

import numpy as np
import pytest
import torch

from w1train.diffusion import philox
from w1train.diffusion.philox import Purpose, philox_4x32, philox_4x32_numpy, random_words, random_words_of_streams

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return [int(word, 16) for word in text.split()]


def _of_arrays(counter, key):
    """What the CPU draws with, called as ``philox_4x32`` is."""
    words = torch.from_numpy(philox_4x32_numpy([lane.numpy().astype(np.uint32) for lane in counter], key))
    return words.unbind(dim=-1)


both = pytest.mark.parametrize("implementation", [philox_4x32, _of_arrays], ids=["tensors", "arrays"])


@both
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected, implementation):
    tensors = tuple(torch.tensor([word], dtype=torch.int64) for word in _words(counter))
    result = implementation(tensors, tuple(_words(key)))
    assert [int(word) for word in result] == _words(expected)


def test_words_depend_on_every_argument_and_on_nothing_else():
    base = {"draw": 0, "purpose": Purpose.NOISE, "num": 9}
    indices = torch.tensor([5, 2**40 + 5, -1])
    words = random_words(7, indices, **base)
    assert torch.equal(words[1:2], random_words(7, indices[1:2], **base)), "independent of the rest of the batch"
    assert torch.equal(words[:, :4], random_words(7, indices, **{**base, "num": 4})), "independent of how many are drawn"
    for other in (
        random_words(8, indices, **base),
        random_words(7 + 2**32, indices, **base),
        random_words(7, indices + 1, **base),
        random_words(7, indices, **{**base, "draw": 1}),
        random_words(7, indices, **{**base, "purpose": Purpose.LENGTH}),
    ):
        assert (other != words).float().mean() > 0.99
    assert len(set(words.flatten().tolist())) == words.numel()


def _philox_of_integers(counter, key):
    """The algorithm as the paper writes it, on Python's integers: one element at a time, no lanes in pairs, nothing in place."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product_0, product_1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = product_1 >> 32 ^ c1 ^ k0, product_1 % 2**32, product_0 >> 32 ^ c3 ^ k1, product_0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@both
@pytest.mark.parametrize("key", [(0, 0), (2**32 - 1, 2**31), (1, 7)])
def test_every_element_is_what_integers_give(key, implementation):
    columns, rows, one = torch.randint(2**32, (1, 7)), torch.randint(2**32, (3, 1)), torch.tensor([[2**32 - 1]])
    counter = (columns, rows, one, torch.randint(2**32, (3, 7)))
    before = [lane.clone() for lane in counter]
    words = torch.stack(implementation(counter, key), dim=-1)
    elements = torch.stack(torch.broadcast_tensors(*counter), dim=-1)
    expected = [[_philox_of_integers(element, key) for element in row] for row in elements.tolist()]
    assert words.tolist() == [[list(element) for element in row] for row in expected]
    assert all(torch.equal(lane, copy) for lane, copy in zip(counter, before, strict=True)), "the caller's counters are left alone"


def test_several_streams_at_once_are_those_drawn_one_by_one():
    streams = [(Purpose.STRATUM, torch.tensor([0, 3])), (Purpose.TIMESTEP, torch.tensor([7, -1, 2**40]))]
    together = random_words_of_streams(9, streams, draw=2, num=6)
    for words, (purpose, indices) in zip(together, streams, strict=True):
        assert torch.equal(words, random_words(9, indices, draw=2, purpose=purpose, num=6))


@pytest.mark.parametrize("num", [1, 4, 37])
def test_devices_draw_the_same_words(num, monkeypatch):
    """What a GPU draws with, on the CPU; indices of 64 bits, and seeds."""
    streams = [(Purpose.NOISE, torch.tensor([0, -1, 2**62 + 5])), (Purpose.LENGTH, torch.tensor([2**32 - 1, 2**32]))]
    for seed in (0, 1234, 2**64 - 1):
        arrays = random_words_of_streams(seed, streams, draw=2**24 - 1, num=num)
        with monkeypatch.context() as patch:
            patch.setattr(philox, "_words_on_cpu", philox._words_on_device)
            tensors = random_words_of_streams(seed, streams, draw=2**24 - 1, num=num)
        assert [words.shape for words in arrays] == [(3, num), (2, num)]
        assert all(torch.equal(*pair) for pair in zip(arrays, tensors, strict=True))


@pytest.mark.parametrize("counters_at_once", [1, 6, 9])
def test_blocks_of_counters_are_drawn_as_one(counters_at_once, monkeypatch):
    streams = [(Purpose.NOISE, torch.tensor([7, -1, 2**40, 3])), (Purpose.LENGTH, torch.tensor([7, 2**62]))]
    whole = random_words_of_streams(5, streams, draw=3, num=10)
    monkeypatch.setattr(philox, "_COUNTERS_AT_ONCE", counters_at_once)
    blocks = random_words_of_streams(5, streams, draw=3, num=10)
    assert all(torch.equal(*pair) for pair in zip(blocks, whole, strict=True))


def test_words_are_uniform():
    words = random_words(1, torch.arange(512), draw=0, purpose=Purpose.NOISE, num=512)
    assert words.min() >= 0
    assert words.max() < 2**32
    counts = torch.bincount((words >> 24).flatten(), minlength=256).double()
    expected = words.numel() / 256
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 170 < chi_squared < 350  # 255 degrees of freedom: mean 255, sd 22.6
