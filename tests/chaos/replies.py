"""A dataset of prompts, which stay clean, and of replies, which are learned: each reply is its prompt once more."""

from __future__ import annotations

import random
from pathlib import Path

from tests.end_to_end.runs import VOCAB_SIZE
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import DatasetWriter

_FIRST_ID = 16
"""The ids below it are special tokens."""


def make_replies(directory: Path) -> None:
    """Write DIRECTORY/replies and DIRECTORY/replies_validation. No document is longer than a sample of the tiny run."""
    generator = random.Random(2)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    for name, num_documents in (("replies", 600), ("replies_validation", 60)):
        with DatasetWriter(directory / name, tokenizer, limits_noise=True) as writer:
            for _ in range(num_documents):
                prompt = generator.choices(range(_FIRST_ID, VOCAB_SIZE), k=generator.randint(2, 15))
                writer.add_document([*prompt, *prompt], 2 * len(prompt), [False] * len(prompt) + [True] * (len(prompt) + 1))
            writer.finalize()
