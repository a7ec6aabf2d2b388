"""Philox4x32-10 against the known-answer vectors published with Random123."""

import pytest
import torch

from w1train.diffusion.philox import Purpose, philox_4x32, random_words

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    tensors = tuple(torch.tensor([word], dtype=torch.int64) for word in _words(counter))
    result = philox_4x32(tensors, tuple(_words(key)))
    assert [int(word) for word in result] == _words(expected)


def test_words_depend_on_every_argument_and_on_nothing_else():
    base = dict(draw=0, purpose=Purpose.MASK, num=9)
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


def test_words_are_uniform():
    words = random_words(1, torch.arange(512), draw=0, purpose=Purpose.MASK, num=512)
    assert words.min() >= 0 and words.max() < 2**32
    counts = torch.bincount((words >> 24).flatten(), minlength=256).double()
    expected = words.numel() / 256
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 170 < chi_squared < 350  # 255 degrees of freedom: mean 255, sd 22.6
