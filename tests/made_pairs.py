"""A preference dataset for tests: a prompt, a chosen reply of low ids, and a rejected reply of high ids, so that a few steps tell them
apart."""

from __future__ import annotations

import random
from pathlib import Path

from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import DatasetWriter

_PROMPT, _CHOSEN, _REJECTED = range(16, 300), range(16, 80), range(80, 300)
_LENGTHS = range(3, 9)
"""Tokens of a prompt, and of each of its replies."""


def write_pairs(prefix: Path, tokenizer: Path, num_pairs: int, seed: int) -> None:
    """Write a dataset of pairs whose documents are shorter than 32 tokens."""
    generator = random.Random(seed)
    with DatasetWriter(prefix, Tokenizer.load(tokenizer), limits_noise=True) as writer:
        for _ in range(num_pairs):
            length = generator.choice(_LENGTHS)
            prompt, *replies = (generator.choices(ids, k=length) for ids in (_PROMPT, _CHOSEN, _REJECTED))
            for reply in replies:
                writer.add_document([*prompt, *reply], 2 * length, [False] * length + [True] * (length + 1))
        writer.finalize()
