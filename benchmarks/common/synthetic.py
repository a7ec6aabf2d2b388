"""Datasets of random tokens, so that a measurement needs no corpus. The time of a step does not depend on the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from w1train.data.tokenizer import Tokenizer, train_tokenizer
from w1train.data.writer import DatasetWriter

# The standard deviation of the logarithm of document lengths: most lengths are between a ninth of the median and nine times the median.
_LENGTH_SPREAD = 1.1


def write_dataset(prefix: Path, tokenizer: Tokenizer, *, num_tokens: int, median_document_length: int, seed: int = 0) -> None:
    """Write documents of uniformly random tokens and log-normal lengths, with ``num_tokens`` or a few more tokens in all."""
    generator = np.random.default_rng(seed)
    first_token = max(tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) + 1
    remaining = num_tokens
    with DatasetWriter(prefix, tokenizer, overwrite=True) as writer:
        while remaining > 0:
            length = max(1, round(median_document_length * float(np.exp(_LENGTH_SPREAD * generator.standard_normal()))))
            # The tokens stay a NumPy array, because a list of a million Python integers takes seconds.
            tokens = generator.integers(first_token, tokenizer.vocab_size, length)
            writer.add_document(tokens, num_text_bytes=4 * length)  # type: ignore[arg-type]
            remaining -= length + 1
        writer.finalize()


def make_tokenizer(vocab_size: int, mask_token_id: int) -> Tokenizer:
    """Return a tokenizer with ``vocab_size`` ids, trained on random words."""
    generator = np.random.default_rng(0)
    letters = generator.integers(ord("a"), ord("z") + 1, (vocab_size, 6), dtype=np.uint8)
    words = " ".join(row.tobytes().decode("ascii") for row in letters)
    # Every word is given twice, because a merge needs a pair that occurs twice.
    return train_tokenizer([words, words], vocab_size=vocab_size, mask_token_id=mask_token_id)
